"""Sampling parameters out of JSON: of a text model's `sampling_parameters`, and of a request's own parameters.

What values must be is the business of SamplingParams. Here those get their own form that came as text.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from hasten.core.sampling import KINDS
from hasten.core.text import from_json
from hasten.core.values import Kind
from hasten.server.json_size import check_json_size
from hasten.server.tokenizing import check_entries
from hasten.server.types import invalid

_FLAGS = {"true": True, "false": False}


def _loaded(text: str) -> Any:
    check_json_size(text.encode(errors="replace"))
    return from_json(text)


_FROM_TEXT: Mapping[Kind, Callable[[str], Any]] = {
    Kind.WHOLE: int,
    Kind.NUMBER: float,
    Kind.FLAG: lambda text: _FLAGS.get(text.lower(), text),
    **dict.fromkeys((Kind.TOKENS, Kind.RUNS, Kind.BIASES, Kind.STRUCTURED), _loaded),
}
"""vLLM's numbers may be text, and a request's parameters, which have no lists and no objects, hold those as JSON."""


def _read(name: str, value: Any) -> Any:
    kind = KINDS[name]
    if isinstance(value, str):
        if kind in _FROM_TEXT:
            value = _FROM_TEXT[kind](value)
        elif name == "choice" and value.startswith("["):
            value = _loaded(value)
    if kind is Kind.TOKENS and type(value) is int:
        return [value]
    if kind is Kind.RUNS and isinstance(value, list):
        return [[run] if type(run) is int else run for run in value]
    if kind is Kind.BIASES and isinstance(value, dict):
        return {int(token): bias for token, bias in value.items()}
    return json.dumps(value) if name == "json_schema" and isinstance(value, dict) else value


def sampling_options(raw: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of SamplingParams from JSON; ServiceError for an unknown name or a wrong text. Null: unset.

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
            options[name] = _read(name, value)
        except ValueError:
            raise invalid(f"sampling parameter '{name}' must be {KINDS[name]}, got {value!r:.80}") from None
    check_entries(options)
    return options
