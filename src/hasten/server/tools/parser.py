"""Calls of tools that are JSON: objects, lists of them, or names with objects behind them."""

import re
from collections.abc import Collection

from hasten.server.tools.forms import ToolForm
from hasten.server.tools.json_stream import CallObject, JsonValue
from hasten.server.tools.reader import MAX_SPACE, StepReader, begun_mark, space_end

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
        self._held: list[str] = []
        """Text of a call whose name is not known yet."""
        self._held_length = 0
        self._begun = False
        """Whether the call's name was given."""
        self._marked = False

    def _finish(self) -> None:
        if self._held:
            self._release()

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
        if closing and closing.startswith(rest) and not last:
            return at
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
        self._held.clear()
        self._held_length = 0
        self._begun = True
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
        text = "".join(self._held)
        self._held.clear()
        self._held_length = 0
        self._put_text(text)
        self._step = self._text
