"""Calls of tools that are JSON: objects, lists of them, or names with objects behind them.

JSON comes in pieces, of which the end of a value and the parts of an object that describes a call are found. Each
character is looked at once, nothing recurses, and of a value that is passed on nothing is kept.
"""

import json
import re
from collections.abc import Callable, Collection

from hasten.server.tools.forms import ToolForm
from hasten.server.tools.reader import MAX_SPACE, StepReader, begun_mark, space_end

_IN_STRING, _OUTSIDE = re.compile(r'[^"\\]*'), re.compile(r'[^"{}\[\]]*')
_SCALAR, _SPACE, _BETWEEN = re.compile(r"[^\s,}\]]*"), re.compile(r"\s*"), re.compile(r"[\s,]*")
_LONGEST_NAME = 256
"""Characters of a key or a function's name."""
_ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """The end of a list, an object or a string. `ended` once it has come."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str, at: int) -> int:
        """Where in `text` the value ends that begins or goes on at `at`; the length of `text` if it does not."""
        while at < len(text) and not self.ended:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_IN_STRING if self._in_string else _OUTSIDE).match(text, at)
            assert match is not None, "both match anything"
            at = match.end()
            if at < len(text):
                self._mark(text[at])
                at += 1
        return at

    def _mark(self, mark: str) -> None:
        if mark == "\\":
            self._escaped = True
        elif mark == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if mark in "{[" else -1
        self.ended = not self._in_string and self._depth <= 0


class CallObject:
    """An object `{"name": ..., "arguments": {...}}` in the order of its pieces; `parameters` are arguments too.

    `failed` once it shows that it is none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_arguments = False
        """Whether their key has come."""
        self.ended = False
        self.failed = False
        self._arguments: list[str] = []
        self._step: Callable[[str, int], int] = self._open
        self._value = JsonValue()
        self._key = ""
        self._captured: list[str] = []
        self._length = 0
        self._passes_on = False

    def feed(self, text: str, at: int) -> int:
        """Where in `text` the object ends that begins or goes on at `at`; the length of `text` if it does not."""
        while at < len(text) and not (self.ended or self.failed):
            at = self._step(text, at)
        return at

    def take(self) -> str:
        """The arguments' JSON since the last call."""
        arguments = "".join(self._arguments)
        self._arguments.clear()
        return arguments

    def _open(self, text: str, at: int) -> int:
        self.failed = text[at] != "{"
        self._step = self._before_key
        return at + 1

    def _before_key(self, text: str, at: int) -> int:
        at = _end(_BETWEEN, text, at)
        if at == len(text):
            return at
        if text[at] == "}":
            self.ended = True
            return at + 1
        self.failed = text[at] != '"'
        self._begin(self._in_key)
        return at

    def _in_key(self, text: str, at: int) -> int:
        end = self._value.feed(text, at)
        self._capture(text[at:end], _LONGEST_NAME)
        if self._value.ended:
            self._key = str(self._decoded())
            self._step = self._before_colon
        return end

    def _before_colon(self, text: str, at: int) -> int:
        at = _end(_SPACE, text, at)
        if at < len(text):
            self.failed = text[at] != ":"
            self._step = self._before_value
            at += 1
        return at

    def _before_value(self, text: str, at: int) -> int:
        at = _end(_SPACE, text, at)
        if at < len(text):
            is_arguments = self._key in _ARGUMENTS and not self.has_arguments
            self.has_arguments = self.has_arguments or is_arguments
            self._passes_on = is_arguments and text[at] == "{"
            self._begin(self._in_value if text[at] in '{["' else self._in_scalar)
        return at

    def _in_value(self, text: str, at: int) -> int:
        end = self._value.feed(text, at)
        if self._passes_on:
            self._arguments.append(text[at:end])
        else:
            self._capture(text[at:end], _LONGEST_NAME if self._key == "name" else None)
        if self._value.ended:
            self._finish_value()
        return end

    def _in_scalar(self, text: str, at: int) -> int:
        end = _end(_SCALAR, text, at)
        self._capture(text[at:end], None)
        if end < len(text):
            self._finish_value()
        return end

    def _begin(self, step: Callable[[str, int], int]) -> None:
        self._value, self._step = JsonValue(), step
        self._captured.clear()
        self._length = 0

    def _capture(self, text: str, limit: int | None) -> None:
        self._length += len(text)
        self.failed = self.failed or (limit is not None and self._length > limit)
        if self._key in ("name", *_ARGUMENTS) or self._step == self._in_key:
            self._captured.append(text)

    def _finish_value(self) -> None:
        self._step = self._before_key
        if self._key == "name" and self.name is None:
            decoded = self._decoded()
            self.name = decoded if isinstance(decoded, str) else None
            self.failed = self.failed or not self.name
        elif self._key in _ARGUMENTS and not self._passes_on:
            decoded = self._decoded()
            if isinstance(decoded, str):
                self._arguments.append(decoded)
            elif decoded is not None:
                self.failed = True
        self._key = ""

    def _decoded(self) -> object:
        """What was captured; `failed` where it is no JSON."""
        try:
            return json.loads("".join(self._captured))
        except (ValueError, RecursionError):
            self.failed = True
            return None


def _end(pattern: "re.Pattern[str]", text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None, "it matches anything"
    return match.end()


_MAX_HELD = 64 << 10
"""Characters before a function's name: what is longer is text."""
_NAME_END = re.compile(r"\[(?:ARGS|CALL_ID)\]")


class ToolParser(StepReader):
    """Reads one answer.

    `names` are the functions' names: an object without a mark is a call only of one of them. Of more calls than
    `max_calls` nothing is given.
    """

    def __init__(self, form: ToolForm, names: Collection[str], max_calls: int | None = None) -> None:
        super().__init__(self._start if form.begins_bare else self._text, max_calls)
        self._form = form
        self._names = names
        self._object = CallObject()
        self._value = JsonValue()
        self._held_length = 0
        self._begun = False
        """Whether the call's name was given."""
        self._marked = False

    def _start(self, text: str, at: int, last: bool) -> int:
        """The beginning of an answer that may be a call without a mark."""
        begin = space_end(text, at)
        if begin == len(text) and not last and begin - at <= MAX_SPACE:
            return at
        if begin < len(text) and text[begin] == "{":
            self._begin_object(text[at:begin], marked=False)
            return begin
        self._step = self._text
        return at

    def _text(self, text: str, at: int, last: bool) -> int:
        """Text, up to the next mark."""
        mark = self._form.opening
        found = text.find(mark, at)
        if found >= 0:
            self._put_text(text[at:found])
            self._hold(mark)
            self._step = self._opened
            return found + len(mark)
        end = len(text) if last else len(text) - begun_mark(text, at, mark)
        self._put_text(text[at:end])
        return end

    def _opened(self, text: str, at: int, last: bool) -> int:
        """What follows a mark: an object, a list of them, or a name."""
        begin = space_end(text, at)
        if begin == len(text):
            return self._hold_or_release(text, at, begin)
        if text[begin] == "{":
            self._begin_object(text[at:begin], marked=True)
        elif text[begin] == "[" and self._form.is_list:
            self._step = self._listed
            return self._hold_or_release(text, at, begin + 1)
        elif self._form.is_list:
            self._step = self._name
            return at
        else:
            self._release()
            return at
        return begin

    def _listed(self, text: str, at: int, last: bool) -> int:
        """The beginning of a list: an object."""
        begin = space_end(text, at)
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
        if begin < 0 and not last and len(text) - at <= MAX_SPACE:
            return at
        name = _NAME_END.split(text[at:begin], maxsplit=1)[0].strip()
        if begin < 0 or not name:
            self._release()
            return at
        self._begin_call(name)
        self._value = JsonValue()
        self._step = self._in_arguments
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
        begin = space_end(text, at)
        if begin == len(text):
            return begin
        rest, closing = text[begin : begin + len(self._form.closing)], self._form.closing
        if closing and rest == closing:
            self._step = self._text
            return begin + len(closing)
        if closing and closing.startswith(rest):
            return len(text) if last else at  # an answer may be cut within the mark, which is no text for that
        if not closing and text[begin] in ",;]":
            return begin + 1
        if not closing and text[begin] == "{" and (self._form.is_list or self._form.begins_bare):
            self._begin_object("", marked=self._marked)
            return begin
        self._step = self._text
        return begin

    def _begin_object(self, before: str, *, marked: bool) -> None:
        self._hold(before)
        self._object, self._begun, self._marked = CallObject(), False, marked
        self._step = self._in_object

    def _begin_call(self, name: str) -> None:
        self._dropped()
        self._held_length, self._begun = 0, True
        super()._begin_call(name)

    def _end_call(self) -> None:
        self._after_call = True
        self._step = self._between

    def _hold(self, text: str) -> None:
        if text:
            self._held.append(text)
            self._held_length += len(text)

    def _hold_or_release(self, text: str, at: int, end: int) -> int:
        self._hold(text[at:end])
        if self._held_length > MAX_SPACE:
            self._release()
        return end

    def _release(self) -> None:
        """What was held was no call."""
        self._put_text(self._dropped())
        self._held_length, self._step = 0, self._text
