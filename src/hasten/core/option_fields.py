"""Fields of configurations: their options on the command line, and how their values are checked."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any

from hasten.core.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as `1073741824`, `512MiB`, `1G` or `1.5GB`; ConfigError for anything else.

    As in GNU's tools, a letter alone and `iB` count in powers of 1024, `B` in powers of 1000.
    """
    found = _SIZE.fullmatch(text.strip())
    size = math.inf
    if found is not None and found[3].lower() != "i" and (found[3].lower() != "ib" or found[2]):
        base = 1000 if found[3].lower() == "b" else 1024
        size = float(found[1]) * base ** " kmgt".index(found[2].lower() or " ")
    if not math.isfinite(size):
        raise ConfigError(f"{text!r:.80} is not a number of bytes; write it as 1073741824, 512MiB, 1G or 1.5GB")
    return round(size)


def option(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002 - `help` is argparse's own word
    """A dataclass field that the command line offers, with its help text.

    Further metadata: `flag` and `short` are the option's names where they are not the field's, `aliases` are other
    names of the field, as identifiers; `choices` are the values that it takes; `kind` is `size` for a number of bytes
    and `path` for a file or folder, whose `~` is expanded.
    """
    return field(default=default, metadata={"help": help, **metadata})


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with this message where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


_KINDS: dict[type, tuple[Callable[[object], bool], str]] = {
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    str: (lambda value: isinstance(value, str), "a text"),
}


def check_fields(config: Any) -> None:
    """Raise ConfigError that names a field of a plain type whose value is of another, or none of its choices."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, parts = getattr(config, name), typing.get_args(hint) or (hint,)
        if value is None and type(None) in parts:
            continue
        for part in parts:
            if part in _KINDS:
                fits, kind = _KINDS[part]
                or_none = " or None" if type(None) in parts else ""
                require(fits(value), f"{name} must be {kind}{or_none}, got {value!r:.80}")
    for each in dataclasses.fields(config):
        value, choices = getattr(config, each.name), each.metadata.get("choices")
        require(
            value is None or choices is None or value in choices,
            f"{each.name} {value!r:.80} is not supported; there is {', '.join(choices or ())}",
        )
