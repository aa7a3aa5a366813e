"""Text that comes from outside: it is UTF-8, and its lines end at a line feed."""

import json
import os
from collections.abc import Callable
from typing import Any

from hasten.core.errors import InvalidRequestError


def require_utf8(name: str, text: str) -> None:
    """Raise InvalidRequestError that begins with `name` where `text` has a lone surrogate, which UTF-8 cannot encode.

    Such strings come from bytes that are no UTF-8 (arguments, file names) and from broken escapes in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} is not valid UTF-8: it has the lone surrogate {ascii(text[error.start])[1:-1]} at position "
            f"{error.start}"
        ) from None


def from_json(text: str | bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a text in JSON; ValueError where it is none, or is nested more deeply than Python can read.

    `parse_constant` is given NaN and infinities, as by `json.loads`.
    """
    try:
        return json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: the beginning of a longer one, and a mark that more followed."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def utf8_lines(data: bytes) -> list[str]:
    r"""Lines of a UTF-8 file, without their ends: `\n` or `\r\n`, and nothing else ends a line.

    A byte order mark at the start is dropped. Raises UnicodeDecodeError where the bytes are not UTF-8.
    """
    lines = data.decode("utf-8-sig").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def from_command_line(text: str) -> str:
    """An argument as text: bytes that the locale could not decode are UTF-8, whatever the locale.

    One that is not UTF-8 stays as it is, with its surrogates, for `require_utf8` to refuse.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            return text
