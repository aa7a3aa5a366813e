"""From the text of an answer to its calls of tools, piece by piece.

The time is linear in the text, however it is cut, and what is held back is bounded: a mark that has begun, spaces, and
what stands before a function's name.
"""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from hasten.server.tools.forms import ToolForm
from hasten.server.tools.json_stream import CallObject, JsonValue

_MAX_HELD, _MAX_SPACE = 64 << 10, 1024
"""Characters before a function's name, and of spaces: what is longer is text."""
_SPACE = re.compile(r"\s*")
_NAME_END = re.compile(r"\[(?:ARGS|CALL_ID)\]")


class TextPiece(NamedTuple):
    """Text that is no call."""

    text: str


class CallPiece(NamedTuple):
    """The beginning of a call, which has its name, or more of its arguments' JSON."""

    number: int
    """Which of the answer's calls it belongs to."""
    name: str | None
    arguments: str


Piece = TextPiece | CallPiece


class ToolParser:
    """Reads one answer. `feed` gives what each piece of its text brings, `end` what was held back.

    `names` are the functions' names: an object without a mark is a call only of one of them. Of more calls than
    `max_calls` nothing is given.
    """

    def __init__(self, form: ToolForm, names: Collection[str], max_calls: int | None = None) -> None:
        self.calls = 0
        """Calls that have begun."""
        self._form = form
        self._names = names
        self._max_calls = max_calls
        self._state: Callable[[str, int, bool], int] = self._start if form.begins_bare else self._text
        self._pending = ""
        """What may be the beginning of a mark."""
        self._space = ""
        """Spaces before which there was no text, or a call."""
        self._after_call = True
        self._object = CallObject()
        self._value = JsonValue()
        self._held: list[str] = []
        """Text of a call whose name is not known yet."""
        self._held_length = 0
        self._begun = False
        """Whether the call's name was given."""
        self._has_arguments = False
        self._marked = False
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text brings."""
        return self._run(text, last=False)

    def end(self) -> list[Piece]:
        """The pieces that the end of the text brings."""
        self._run("", last=True)
        if self._held:
            self._release()
        if self._space and not self.calls:
            self._pieces.append(TextPiece(self._space))
        return self._taken()

    def _run(self, text: str, *, last: bool) -> list[Piece]:
        text, self._pending = self._pending + text, ""
        at = 0
        while at < len(text):
            state = self._state
            new = state(text, at, last)
            if new == at and self._state == state:
                self._pending = text[at:]
                break
            at = new
        return [] if last else self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # Each state takes some of the text from `at` on and gives where it ended: `at` itself, without a new state, where
    # only more text can decide. With `last` no more will come.

    def _start(self, text: str, at: int, last: bool) -> int:
        """The beginning of an answer that may be a call without a mark."""
        begin = _end(text, at)
        if begin == len(text) and not last and begin - at <= _MAX_SPACE:
            return at
        if begin < len(text) and text[begin] == "{":
            self._begin_object(text[at:begin], marked=False)
            return begin
        self._state = self._text
        return at

    def _text(self, text: str, at: int, last: bool) -> int:
        """Text, up to the next mark."""
        mark = self._form.opening
        found = text.find(mark, at)
        if found >= 0:
            self._put_text(text[at:found])
            self._hold(mark)
            self._state = self._opened
            return found + len(mark)
        end = len(text) if last else len(text) - _begun_mark(text, at, mark)
        self._put_text(text[at:end])
        return end

    def _opened(self, text: str, at: int, last: bool) -> int:
        """What follows a mark: an object, a list of them, or a name."""
        begin = _end(text, at)
        if begin == len(text):
            return self._hold_or_release(text, at, begin)
        if text[begin] == "{":
            self._begin_object(text[at:begin], marked=True)
        elif text[begin] == "[" and self._form.is_list:
            self._state = self._listed
            return self._hold_or_release(text, at, begin + 1)
        elif self._form.is_list:
            self._state = self._name
            return at
        else:
            self._release()
            return at
        return begin

    def _listed(self, text: str, at: int, last: bool) -> int:
        """The beginning of a list: an object."""
        begin = _end(text, at)
        if begin == len(text):
            return self._hold_or_release(text, at, begin)
        if text[begin] != "{":
            self._release()
            return at
        self._begin_object(text[at:begin], marked=True)
        return begin

    def _name(self, text: str, at: int, last: bool) -> int:
        """A name of its own, and the mark behind it."""
        begin = text.find("{", at)
        if begin < 0 and not last and len(text) - at <= _MAX_SPACE:
            return at
        name = _NAME_END.split(text[at:begin], maxsplit=1)[0].strip()
        if begin < 0 or not name:
            self._release()
            return at
        self._begin_call(name)
        self._value = JsonValue()
        self._state = self._in_arguments
        return begin

    def _in_arguments(self, text: str, at: int, last: bool) -> int:
        """The arguments behind a name of its own."""
        end = self._value.feed(text, at)
        self._put_arguments(text[at:end])
        if self._value.ended:
            self._end_call()
        return end

    def _in_object(self, text: str, at: int, last: bool) -> int:
        """A call as one object."""
        call = self._object
        end = call.feed(text, at)
        if not self._begun:
            self._hold(text[at:end])
            known = self._marked or call.name in self._names
            if call.name and known and (call.has_arguments or (self._marked and call.ended)):
                self._begin_call(call.name)
            elif call.ended or call.failed or self._held_length > _MAX_HELD:
                self._release()
                return end
        if self._begun:
            self._put_arguments(call.take())
            if call.ended and not self._has_arguments:
                self._put_arguments("{}")
            if call.ended or call.failed:
                self._end_call()
        return end

    def _between(self, text: str, at: int, last: bool) -> int:
        """What follows a call: its closing mark, one more call, or text."""
        begin = _end(text, at)
        if begin == len(text):
            return begin
        rest, closing = text[begin : begin + len(self._form.closing)], self._form.closing
        if closing and rest == closing:
            self._state = self._text
            return begin + len(closing)
        if closing and closing.startswith(rest) and not last:
            return at
        if not closing and text[begin] in ",;]":
            return begin + 1
        if not closing and text[begin] == "{" and (self._form.is_list or self._form.begins_bare):
            self._begin_object("", marked=self._marked)
            return begin
        self._state = self._text
        return begin

    def _begin_object(self, before: str, *, marked: bool) -> None:
        self._hold(before)
        self._object, self._begun, self._marked = CallObject(), False, marked
        self._state = self._in_object

    def _begin_call(self, name: str) -> None:
        self._held.clear()
        self._held_length = 0
        self._begun, self._has_arguments, self._space = True, False, ""
        self.calls += 1
        if self._is_shown:
            self._pieces.append(CallPiece(self.calls - 1, name, ""))

    def _put_arguments(self, text: str) -> None:
        if text and self._is_shown:
            self._pieces.append(CallPiece(self.calls - 1, None, text))
        self._has_arguments = self._has_arguments or bool(text)

    def _end_call(self) -> None:
        self._after_call = True
        self._state = self._between

    @property
    def _is_shown(self) -> bool:
        return self._max_calls is None or self.calls <= self._max_calls

    def _hold(self, text: str) -> None:
        if text:
            self._held.append(text)
            self._held_length += len(text)

    def _hold_or_release(self, text: str, at: int, end: int) -> int:
        self._hold(text[at:end])
        if self._held_length > _MAX_SPACE:
            self._release()
        return end

    def _release(self) -> None:
        """What was held was no call."""
        text = "".join(self._held)
        self._held.clear()
        self._held_length = 0
        self._put_text(text)
        self._state = self._text

    def _put_text(self, text: str) -> None:
        """Give text, but no spaces alone before the first text and behind calls."""
        if self._after_call and not text.strip() and len(self._space) <= _MAX_SPACE:
            self._space += text
            return
        if text or self._space:
            self._pieces.append(TextPiece(self._space + text))
        self._space, self._after_call = "", False


def _end(text: str, at: int) -> int:
    """Where the spaces end that begin at `at`."""
    match = _SPACE.match(text, at)
    assert match is not None, "it matches anything"
    return match.end()


def _begun_mark(text: str, at: int, mark: str) -> int:
    """Characters at the end of a text with which the mark may begin."""
    longest = min(len(mark) - 1, len(text) - at)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)
