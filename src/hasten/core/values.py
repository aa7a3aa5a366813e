"""Types of a request's parameters: validation, and the form in which values are stored."""

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, TypeVar

from hasten.core.errors import InvalidRequestError
from hasten.core.text import require_utf8


def require(condition: bool, message: str) -> None:
    """InvalidRequestError with this message where the condition does not hold."""
    if not condition:
        raise InvalidRequestError(message)


def is_whole(value: object) -> bool:
    """Whether it is an integer, of Python or of numpy, and no bool."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python or of numpy, and no bool."""
    return type(value) is float or is_whole(value) or (isinstance(value, Real) and not isinstance(value, bool))


def _each(name: str, given: object, what: str) -> tuple[Any, ...]:
    """The items of a sequence; None stands for an empty one."""
    if given is None:
        return ()
    countable = isinstance(given, Iterable) and not isinstance(given, str | bytes | bytearray | Mapping)
    require(countable, f"{name} must be {what}, got {given!r:.80}")
    return tuple(given)  # type: ignore[arg-type]  # checked just now


def _whole(name: str, value: object) -> int:
    if not is_whole(value):
        raise InvalidRequestError(f"{name} must be a whole number, got {value!r}")
    return int(value)  # type: ignore[call-overload]  # checked just now


def _number(name: str, value: object) -> object:
    if not is_number(value):
        raise InvalidRequestError(f"{name} must be a number, got {value!r}")
    return value


def _flag(name: str, value: object) -> object:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be True or False, got {value!r}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string, got {value!r:.80}")
    require(value != "", f"{name} is empty")
    require_utf8(name, value)
    return value


def _texts(name: str, given: object) -> tuple[str, ...]:
    kept = (given,) if isinstance(given, str) else _each(name, given, "a string or a list of strings")
    require(all(isinstance(text, str) for text in kept), f"{name} holds something that is not a string: {given!r:.80}")
    require(all(kept), f"{name} holds an empty string")
    for text in kept:
        require_utf8(name, text)
    return kept


def _tokens(name: str, ids: object) -> tuple[int, ...]:
    kept = _each(name, ids, "a list of token ids")
    require(all(map(is_whole, kept)), f"{name} holds something that is not a token id: {ids!r:.80}")
    return tuple(map(int, kept))


def _runs(name: str, lists: object) -> tuple[tuple[int, ...], ...]:
    kept = tuple(_tokens(name, ids) for ids in _each(name, lists, "a list of lists of token ids"))
    require(all(kept), f"{name} holds an empty list")
    return kept


def _biases(name: str, given: object) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{name} must map token ids to numbers, got {given!r}")
    for token, bias in given.items():
        require(is_whole(token), f"{name} has something that is not a token id: {token!r}")
        require(is_number(bias) and -100 <= bias <= 100, f"{name} must be from -100 to 100, got {bias!r}")
    return {int(token): float(bias) for token, bias in given.items()}


class Kind(StrEnum):
    """The type of a parameter's values, as messages call it."""

    WHOLE = "a whole number"
    NUMBER = "a number"
    FLAG = "true or false"
    TEXT = "a text"
    TEXTS = "a text or a list of them"
    TOKENS = "a list of token ids"
    RUNS = "a list of lists of token ids"
    BIASES = "numbers by token id"
    STRUCTURED = "an object with json, json_object, regex, choice or grammar"


KEPT: Mapping[Kind, Callable[[str, Any], Any]] = {
    Kind.WHOLE: _whole,
    Kind.NUMBER: _number,
    Kind.FLAG: _flag,
    Kind.TEXT: _text,
    Kind.TEXTS: _texts,
    Kind.TOKENS: _tokens,
    Kind.RUNS: _runs,
    Kind.BIASES: _biases,
}
"""A value, of a parameter of this name, as it is kept; InvalidRequestError where it is of another type."""
_Params = TypeVar("_Params", bound=type[Any])


def with_known_names(instead: Mapping[str, str]) -> Callable[[_Params], _Params]:
    """Let a dataclass of parameters, all with defaults, refuse unknown arguments by name, not by a TypeError; `instead`
    says what to use for some.

    Of those that it names None is accepted: it asks for nothing.
    """

    def decorate(kind: _Params) -> _Params:
        every = fields(kind)
        known = {field.name: field.default for field in every}
        factories = {field.name: field.default_factory for field in every if field.default_factory is not MISSING}

        @functools.wraps(kind.__init__)
        def init(self: Any, *args: Any, **options: Any) -> None:
            if args:
                shown = ", ".join(map(repr, args))
                raise InvalidRequestError(f"{kind.__name__} takes its parameters by name, got {shown:.80}")
            for name in options.keys() - known.keys():
                if options.pop(name) is None and name in instead:
                    continue
                near = difflib.get_close_matches(name, known, 1)
                hint = instead.get(name) or (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
                raise InvalidRequestError(f"{name} is not a parameter of {kind.__name__}: {hint}")
            # a frozen dataclass would set its fields one by one, which takes three times as long
            vars(self).update(known, **{name: make() for name, make in factories.items()})
            vars(self).update(options)
            self.__post_init__()

        kind.__init__ = init
        return kind

    return decorate
