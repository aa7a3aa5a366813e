"""Arguments that stand between XML-like marks, without quotes: their kinds by a function's schema, and their JSON."""

import json
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 8
"""References and alternatives that are followed for one parameter."""
_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
    (type(None), "null"),
)
Schema = Mapping[str, Any]


def resolved(schema: Any, root: Schema) -> Schema:
    """A parameter's schema behind its local references; empty where there is none."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = _referred(reference, root)
    return {}


def _referred(reference: str, root: Schema) -> Any:
    if not reference.startswith("#/"):
        return None
    found: Any = root
    for name in reference[2:].split("/"):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def kinds(schema: Any, root: Schema, depth: int = 0) -> frozenset[str]:
    """JSON types that a parameter may have; none where its schema does not say."""
    known = resolved(schema, root)
    given = known.get("type")
    if isinstance(given, str):
        return frozenset({given})
    if isinstance(given, list):
        return frozenset(kind for kind in given if isinstance(kind, str))
    if "const" in known:
        return frozenset({_kind(known["const"])})
    if isinstance(known.get("enum"), list):
        return frozenset(map(_kind, known["enum"]))
    found = frozenset[str]()
    for name in ("anyOf", "oneOf"):
        for alternative in known.get(name) or () if depth < _MAX_DEPTH else ():
            found |= kinds(alternative, root, depth + 1)
    return found


def is_text(kinds_: frozenset[str]) -> bool:
    """Whether a parameter is a string, whatever stands there."""
    return kinds_ <= {"string"}


def _kind(value: object) -> str:
    return next(name for kind, name in _KINDS if isinstance(value, kind))


def json_argument(text: str, kinds_: frozenset[str]) -> str:
    """The JSON of a parameter that may be something else than a string."""
    stripped = text.strip()
    if "null" in kinds_ and stripped.lower() in ("null", "none"):
        return "null"
    if "boolean" in kinds_ and stripped in ("True", "False"):
        return stripped.lower()
    try:
        kind = _kind(json.loads(stripped, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    fits = kind in kinds_ or (kind == "integer" and "number" in kinds_) or "string" not in kinds_
    return stripped if fits else json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(constant)
