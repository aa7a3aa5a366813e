"""JSON that comes in pieces: the end of a value, and the parts of an object that describes a call.

Each character is looked at once, nothing recurses, and of a value that is passed on nothing is kept.
"""

import json
import re
from collections.abc import Callable

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
