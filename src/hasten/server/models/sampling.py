"""Sampling parameters out of JSON: of a text model's `sampling_parameters`, and of a request's own parameters."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from hasten.core.sampling import KINDS
from hasten.core.values import Kind
from hasten.server.json_size import check_json_size
from hasten.server.tokenizing import check_entries
from hasten.server.types import invalid


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _list_of(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, kind):
            return [value]
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise ValueError
        return value

    return read


def _loaded(text: str) -> Any:
    check_json_size(text.encode(errors="replace"))
    return json.loads(text)


def _choice(value: Any) -> Any:
    """Several texts, in a request's parameters as JSON; one alone would be nothing to choose from."""
    return _list_of(str)(_loaded(value) if isinstance(value, str) and value.startswith("[") else value)


def _from_json(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For values that a request's parameters, which have no lists and no objects, hold as JSON."""
    return lambda value: read(_loaded(value) if isinstance(value, str) else value)


def _runs(value: Any) -> Any:
    tokens = _list_of(int)
    return [tokens(run) for run in value] if isinstance(value, list) else tokens(None)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


_READERS: Mapping[Kind, Callable[[Any], Any]] = {
    Kind.WHOLE: lambda value: int(value) if isinstance(value, str) else value,
    Kind.NUMBER: lambda value: float(value) if isinstance(value, str) else value,
    Kind.FLAG: _flag,
    Kind.TEXT: _text,
    Kind.TEXTS: _list_of(str),
    Kind.TOKENS: _from_json(_list_of(int)),
    Kind.RUNS: _from_json(_runs),
    Kind.BIASES: _from_json(lambda value: {int(token): bias for token, bias in _object(value).items()}),
    Kind.STRUCTURED: _from_json(_object),
}
"""How values of each kind are read: numbers may be written as text, as vLLM's are."""

_READERS_OF: Mapping[str, Callable[[Any], Any]] = {
    **{name: _READERS[kind] for name, kind in KINDS.items()},
    "json_schema": lambda value: json.dumps(value) if isinstance(value, dict) else _text(value),
    "choice": _choice,
}


def sampling_options(raw: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of SamplingParams from JSON; ServiceError for an unknown name or a wrong value. Null: unset.

    `known` has the names that there may be. InvalidRequestError for too many entries of one, or JSON that is
    too large to be read at once.
    """
    check_entries(raw)
    options = {}
    for name, value in raw.items():
        if name not in known:
            raise invalid(f"sampling parameter '{name}' is not known; there are {', '.join(sorted(known))}")
        if value is None:
            continue
        try:
            options[name] = _READERS_OF[name](value)
        except (ValueError, RecursionError):
            raise invalid(f"sampling parameter '{name}' must be {KINDS[name]}, got {value!r:.80}") from None
    check_entries(options)
    return options
