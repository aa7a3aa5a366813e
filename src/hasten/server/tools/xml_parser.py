"""Calls of tools in the form of Qwen3-Coder: functions and parameters between marks, values as they are."""

import json
import re
from collections.abc import Mapping
from typing import Any

from hasten.server.tools.forms import ToolForm
from hasten.server.tools.reader import MAX_SPACE, StepReader, begun_mark, space_end
from hasten.server.tools.rules import is_text, json_argument, kinds

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class XmlToolParser(StepReader):
    """Reads one answer; `schemas` are those of the functions' arguments by name, None for functions without any.

    A function that is not in them is called all the same where the mark of calls stands before it. Values are strings
    but where their schema says otherwise: what is no string is given once it is whole.
    """

    def __init__(
        self, form: ToolForm, schemas: Mapping[str, Mapping[str, Any] | None], max_calls: int | None = None
    ) -> None:
        super().__init__(self._text, max_calls)
        self._form = form
        self._marks = re.compile(f"{re.escape(form.opening)}|{_FUNCTION}")
        self._schemas = schemas
        self._inner = (_FUNCTION_END, _PARAMETER, form.closing)
        self._schema: Mapping[str, Any] = {}
        self._kinds = frozenset[str]()
        self._value: list[str] = []
        """A value that is no string, so far."""
        self._parameters = 0

    def _text(self, text: str, at: int, last: bool) -> int:
        """Text, up to the next mark of calls, or of a function without it."""
        found = self._marks.search(text, at)
        if found is None:
            held = 0 if last else max(begun_mark(text, at, mark) for mark in (self._form.opening, _FUNCTION))
            self._put_text(text[at : len(text) - held])
            return len(text) - held
        self._put_text(text[at : found.start()])
        self._held = [found[0]]
        self._step = self._name if found[0] == _FUNCTION else self._opened
        return found.end()

    def _opened(self, text: str, at: int, last: bool) -> int:
        """What follows the mark of calls: a function."""
        begin = space_end(text, at)
        if text.startswith(_FUNCTION, begin):
            self._held.append(text[at:begin] + _FUNCTION)
            self._step = self._name
            return begin + len(_FUNCTION)
        if not last and _FUNCTION.startswith(text[begin : begin + len(_FUNCTION)]) and begin - at <= MAX_SPACE:
            return at
        self._release()
        return at

    def _name(self, text: str, at: int, last: bool) -> int:
        """A function's name."""
        end = text.find(">", at, at + MAX_SPACE)
        if end < 0 and not last and len(text) - at <= MAX_SPACE:
            return at
        name = text[at:end].strip()
        if end < 0 or not name or (name not in self._schemas and self._held == [_FUNCTION]):
            self._release()
            return at
        self._held.clear()
        self._schema = self._schemas.get(name) or {}
        self._parameters = 0
        self._begin_call(name)
        self._put_arguments("{")
        self._step = self._between
        return end + 1

    def _between(self, text: str, at: int, last: bool) -> int:
        """What follows a function's name or a value: a parameter or the call's end. What is neither is left out."""
        begin = text.find("<", at)
        if begin < 0:
            return len(text)
        for mark, follows in ((_FUNCTION_END, self._closed), (self._form.closing, self._text)):
            if text.startswith(mark, begin):
                self._put_arguments("}")
                self._after_call = True
                self._step = follows
                return begin + len(mark)
        if text.startswith(_PARAMETER, begin):
            end = text.find(">", begin, begin + MAX_SPACE)
            if end < 0 and len(text) - begin <= MAX_SPACE:
                return begin
            if end >= 0:
                self._begin_value(text[begin + len(_PARAMETER) : end].strip())
                return end + 1
        elif any(begun_mark(text, begin, mark) == len(text) - begin for mark in self._inner):
            return begin
        return begin + 1

    def _begin_value(self, name: str) -> None:
        properties = self._schema.get("properties")
        own = properties.get(name) if isinstance(properties, Mapping) else None
        self._kinds = kinds(own, self._schema)
        self._value.clear()
        comma = ", " if self._parameters else ""
        self._parameters += 1
        quote = '"' if is_text(self._kinds) else ""
        self._put_arguments(f"{comma}{json.dumps(name, ensure_ascii=False)}: {quote}")
        self._step = self._before_value

    def _before_value(self, text: str, at: int, last: bool) -> int:
        """The line's end before a value."""
        self._step = self._in_value
        return at + (text[at] == "\n")

    def _in_value(self, text: str, at: int, last: bool) -> int:
        """A value, up to its mark; the line's end before that is none of it."""
        found = text.find(_PARAMETER_END, at)
        end = found if found >= 0 else len(text) - (0 if last else begun_mark(text, at, _PARAMETER_END))
        is_whole = end > at and text[end - 1] == "\n"
        self._put_value(text[at : end - is_whole])
        if found < 0:
            return end if last else end - is_whole
        if is_text(self._kinds):
            self._put_arguments('"')
        else:
            self._put_arguments(json_argument("".join(self._value), self._kinds))
        self._step = self._between
        return found + len(_PARAMETER_END)

    def _put_value(self, text: str) -> None:
        if is_text(self._kinds):
            self._put_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value.append(text)

    def _closed(self, text: str, at: int, last: bool) -> int:
        """What follows a function: the closing mark of the call, one more function, or text."""
        begin = space_end(text, at)
        closing = self._form.closing
        rest = text[begin : begin + len(closing)]
        self._step = self._text
        if rest == closing:
            return begin + len(closing)
        if closing.startswith(rest) and begin - at <= MAX_SPACE:
            self._step = self._closed
            return len(text) if last else at  # an answer may be cut within the mark, which is no text for that
        return at

    def _release(self) -> None:
        """What was held was no call."""
        self._put_text(self._dropped())
        self._step = self._text
