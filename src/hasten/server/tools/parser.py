"""Calls of tools that are JSON: objects, lists of them, or names with objects behind them.

JSON comes in pieces, of which the end of a value and the parts of an object that describes a call are found. Each
character is looked at once, nothing recurses, and of a value that is passed on nothing is kept.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from hasten.core.text import from_json
from hasten.server.tools.forms import ToolForm
from hasten.server.tools.reader import SPACE, AnswerReader, BrokenOffError, Reading

_IN_STRING, _OUTSIDE = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL), re.compile(r'[^"{}\[\]]*')
_SCALAR, _BETWEEN = re.compile(r"[^\s,}\]]*"), re.compile(r"[\s,]*")
_LONGEST_NAME = 256
"""Characters of a key or a function's name."""
_MAX_HELD = 64 << 10
"""Characters before a function's name: what is longer is text."""
_ARGUMENTS = ("arguments", "parameters")
_NAME_END = re.compile(r"\[(?:ARGS|CALL_ID)\]")


class ToolParser(AnswerReader):
    """Reads one answer.

    `names` are the functions' names: an object without a mark is a call only of one of them. Of more calls than
    `max_calls` nothing is given.
    """

    def __init__(self, form: ToolForm, names: Collection[str], max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._form = form
        self._names = names
        self._may_be_bare = form.begins_bare

    def _read(self) -> Reading[None]:
        is_marked, self._may_be_bare = not self._may_be_bare, False
        if is_marked and not (yield from self._until(self._put_text, self._form.opening)):
            return
        self._hold()
        self._at += len(self._form.opening) if is_marked else 0
        first = yield from self._skip(SPACE)
        is_list = is_marked and self._form.is_list
        if is_list and first == "[":
            self._at += 1
            first, is_list = (yield from self._skip(SPACE)), False
        if first == "{":
            yield from self._objects(is_marked=is_marked)
        elif is_list:
            yield from self._named()
        else:
            raise BrokenOffError

    def _named(self) -> Reading[None]:
        """A name, and the arguments behind it."""
        end = yield from self._find("{")
        name = _NAME_END.split(self._text[self._at : end], maxsplit=1)[0].strip()
        if end < 0 or not name:
            raise BrokenOffError
        self._at = end
        self._begin_call(name)
        yield from self._value(self._put_arguments)
        self._end_call()
        if (yield from self._goes_on()):
            yield from self._objects(is_marked=False)

    def _objects(self, *, is_marked: bool) -> Reading[None]:
        """Calls as objects, one behind the other."""
        goes_on = True
        while goes_on:
            try:
                yield from self._object(is_marked=is_marked)
                self._end_call()
            except BrokenOffError:
                if self._held is not None:
                    raise
                self._after_call = True
            goes_on = yield from self._goes_on()

    def _goes_on(self) -> Reading[bool]:
        """Whether one more object follows a call, behind its closing mark or what separates calls."""
        first = yield from self._skip(SPACE)
        if self._form.closing:
            yield from self._closes(self._form.closing)
            return False
        while first in ",;]":
            self._at += 1
            first = yield from self._skip(SPACE)
        return first == "{" and (self._form.is_list or self._form.begins_bare)

    def _object(self, *, is_marked: bool) -> Reading[None]:
        """A call `{"name": ..., "arguments": {...}}` in the order of its pieces; `parameters` are arguments too.

        BrokenOffError once it shows that it is none.
        """
        if self._held is None:
            self._hold()
        self._most_held = _MAX_HELD
        name, has_arguments, before = "", False, list[str]()

        def begin() -> None:
            if self._held is not None and name and (is_marked or name in self._names):
                self._begin_call(name)
                self._put_arguments("".join(before))

        def put(text: str) -> None:
            if self._held is None:
                self._put_arguments(text)
            else:
                before.append(text)

        self._at += 1
        while (first := (yield from self._skip(_BETWEEN))) != "}":
            _require(first == '"')
            key = yield from self._decoded(_LONGEST_NAME)
            _require((yield from self._skip(SPACE)) == ":")
            self._at += 1
            first = yield from self._skip(SPACE)
            if key in _ARGUMENTS:
                is_first, has_arguments = not has_arguments, True
                begin()
                if is_first and first == "{":
                    yield from self._value(put)
                elif (value := (yield from self._decoded())) is not None:
                    _require(isinstance(value, str))
                    put(value)
            elif key == "name" and not name:
                name = yield from self._decoded(_LONGEST_NAME)
                _require(isinstance(name, str) and bool(name))
                if has_arguments:
                    begin()
            else:
                yield from self._value()
        self._at += 1
        if is_marked:
            begin()
        _require(self._held is None)

    def _decoded(self, most: int | None = None) -> Reading[Any]:
        """A value; BrokenOffError where it is no JSON, or has more characters."""
        parts: list[str] = []
        yield from self._value(parts.append)
        text = "".join(parts)
        _require(most is None or len(text) <= most)
        try:
            return from_json(text)
        except ValueError:
            raise BrokenOffError from None

    def _value(self, put: Callable[[str], None] = lambda _: None) -> Reading[None]:
        """Give a value of JSON as it comes."""
        if self._text[self._at] not in '{["':
            yield from self._skip(_SCALAR, put)
            return
        depth, in_string, end = 0, False, self._at
        while end == self._at or depth > 0 or in_string:
            match = (_IN_STRING if in_string else _OUTSIDE).match(self._text, end)
            assert match is not None, "both match anything"
            end = match.end()
            if end == len(self._text) or self._text[end] == "\\":
                end = len(self._text) if self._last else end
                put(self._text[self._at : end])
                self._at = end
                yield from self._more()
                end = self._at
                continue
            mark, end = self._text[end], end + 1
            if mark == '"':
                in_string = not in_string
            else:
                depth += 1 if mark in "{[" else -1
        put(self._text[self._at : end])
        self._at = end


def _require(condition: bool) -> None:
    """BrokenOffError unless what is read can be a call."""
    if not condition:
        raise BrokenOffError
