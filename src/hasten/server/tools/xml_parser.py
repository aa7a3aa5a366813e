"""Calls of tools in the form of Qwen3-Coder: functions and parameters between marks, values as they are."""

import json
import re
from collections.abc import Mapping
from typing import Any

from hasten.server.tools.forms import ToolForm
from hasten.server.tools.reader import SPACE, AnswerReader, BrokenOffError, Reading
from hasten.server.tools.rules import is_text, json_argument, kinds

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NO_MARK = re.compile("[^<]*")


class XmlToolParser(AnswerReader):
    """Reads one answer; `schemas` are those of the functions' arguments by name, None for functions without any.

    A function that is not in them is called all the same where the mark of calls stands before it. Values are strings
    but where their schema says otherwise: what is no string is given once it is whole.
    """

    def __init__(
        self, form: ToolForm, schemas: Mapping[str, Mapping[str, Any] | None], max_calls: int | None = None
    ) -> None:
        super().__init__(max_calls)
        self._form = form
        self._schemas = schemas

    def _read(self) -> Reading[None]:
        """Text, and a function behind the mark of calls or without it."""
        mark = yield from self._until(self._put_text, self._form.opening, _FUNCTION)
        if not mark:
            return
        self._hold()
        self._at += len(mark)
        if mark != _FUNCTION:
            yield from self._skip(SPACE)
            if not (yield from self._sees(_FUNCTION)):
                raise BrokenOffError
            self._at += len(_FUNCTION)
        end = yield from self._find(">")
        name = self._text[self._at : end].strip()
        if end < 0 or not name or (mark == _FUNCTION and name not in self._schemas):
            raise BrokenOffError
        self._at = end + 1
        self._begin_call(name)
        yield from self._arguments(self._schemas.get(name) or {})

    def _arguments(self, schema: Mapping[str, Any]) -> Reading[None]:
        """Parameters, and the end of the call. What is neither is left out."""
        self._put_arguments("{")
        comma = ""
        while True:
            yield from self._skip(_NO_MARK)
            for mark in (_FUNCTION_END, self._form.closing):
                if (yield from self._sees(mark)):
                    self._at += len(mark)
                    self._put_arguments("}")
                    self._end_call()
                    if mark == _FUNCTION_END:
                        yield from self._closing()
                    return
            if (yield from self._sees(_PARAMETER)) and (end := (yield from self._find(">"))) >= 0:
                name = self._text[self._at + len(_PARAMETER) : end].strip()
                self._at = end + 1
                self._put_arguments(f"{comma}{json.dumps(name, ensure_ascii=False)}: ")
                properties = schema.get("properties")
                own = properties.get(name) if isinstance(properties, Mapping) else None
                yield from self._value(kinds(own, schema))
                comma = ", "
            else:
                self._at += 1

    def _value(self, kinds_: frozenset[str]) -> Reading[None]:
        """A value, up to its mark; the ends of lines around it are none of it."""
        parts: list[str] = []

        def put_string(text: str) -> None:
            self._put_arguments(json.dumps(text, ensure_ascii=False)[1:-1])

        if is_text(kinds_):
            self._put_arguments('"')
        if (yield from self._sees("\n")):
            self._at += 1
        put = put_string if is_text(kinds_) else parts.append
        mark = yield from self._until(put, f"\n{_PARAMETER_END}", _PARAMETER_END)
        self._at += len(mark)
        if mark:
            self._put_arguments('"' if is_text(kinds_) else json_argument("".join(parts), kinds_))

    def _closing(self) -> Reading[None]:
        """The closing mark behind a function, if it is there."""
        self._hold()
        yield from self._skip(SPACE)
        if (yield from self._closes(self._form.closing)):
            self._held = None
        self._release()
