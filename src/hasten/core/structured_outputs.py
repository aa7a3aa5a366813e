"""Constraints of an output (JSON schema, regex, grammar, choice), under vLLM's names."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from hasten.core.errors import InvalidRequestError
from hasten.core.values import require

CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")
"""Parameters that the output keeps to, of which one may be given."""
STRUCTURED = "structured_outputs"
ANY_OBJECT = '{"type":"object"}'
"""The JSON schema of any JSON object."""


class StructuredOutputsParams(TypedDict, total=False):
    """What the output keeps to, under vLLM's names: one of these."""

    json: str | Mapping[str, Any]
    """A JSON schema, as JSON or as what it decodes to."""
    json_object: bool
    """True: any JSON object."""
    regex: str
    choice: Sequence[str]
    grammar: str


def _schema(given: object) -> str:
    if isinstance(given, str):
        return given
    require(isinstance(given, Mapping), f"structured_outputs has a json that is no JSON schema: {given!r:.80}")
    try:
        return json.dumps(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"structured_outputs has a json that is not JSON: {error}") from None


def constraint(given: object) -> dict[str, Any]:
    """The fields of SamplingParams for `structured_outputs`."""
    if not isinstance(given, Mapping):
        text = f"structured_outputs must be a dict or StructuredOutputsParams, got {given!r:.80}"
        raise InvalidRequestError(text)
    known = StructuredOutputsParams.__annotations__
    chosen = {name: value for name, value in given.items() if value is not None and value is not False}
    for name in chosen:
        require(name in known, f"structured_outputs has {name!r:.80}, which is not one of {', '.join(known)}")
    require(len(chosen) == 1, f"structured_outputs must have exactly one of {', '.join(known)}, got {list(chosen)}")
    ((name, value),) = chosen.items()
    if name == "json_object":
        return {"json_schema": ANY_OBJECT}
    return {"json_schema": _schema(value)} if name == "json" else {name: value}


def structured(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with what constrains the output as `structured_outputs`, as requests over a network have it."""
    kept = {name: value for name, value in given.items() if name not in CONSTRAINTS}
    for name in CONSTRAINTS:
        if name in given:
            kept[STRUCTURED] = {"json" if name == "json_schema" else name: given[name]}
    return kept
