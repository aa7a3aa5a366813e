"""Rules in llguidance's Lark syntax: of marks, of values by a schema, and of what constrains an answer otherwise.

In the form of Qwen3-Coder a function's arguments stand between XML-like marks, without quotes: their kinds are those of
its schema.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import InvalidRequestError
from hasten.core.text import from_json
from hasten.engine.text import AddedToken

_WHITESPACE = {"whitespace_pattern": " "}
"""At most this between JSON's marks, as for all schemas."""


@dataclass(frozen=True)
class Marks:
    """The marks of a model's answers: those in `tokens`, which were added to its tokenizer's, and others as texts."""

    tokens: Mapping[str, AddedToken]
    end_tokens: Sequence[int]
    """Each of which ends an answer."""

    def rule(self, mark: str) -> str:
        """The rule of a mark."""
        return f"<[{self.tokens[mark].number}]>" if mark in self.tokens else json.dumps(mark)

    def text_without(self, *marks: str) -> str:
        """The rule of any text in which those of some marks that are tokens do not occur."""
        numbers = {self.tokens[mark].number for mark in marks if mark in self.tokens}
        return f"<[^{','.join(map(str, sorted(numbers.union(self.end_tokens))))}]>*"

    def any_special(self, *marks: str) -> bool:
        """Whether one of some marks is a token that texts are mostly shown without."""
        return any(mark in self.tokens and self.tokens[mark].special for mark in marks)


def json_rule(schema: str) -> str:
    """A value by a JSON schema, with little space in it."""
    try:
        given = from_json(schema)
    except ValueError as error:
        raise InvalidRequestError(f"json_schema cannot be compiled: {error}") from None
    options = given if isinstance(given, dict) else {}
    if given is False:
        raise InvalidRequestError("json_schema cannot be satisfied: it is false")
    return f"%json {json.dumps(options | {'x-guidance': _WHITESPACE})}"


def answer_rules(kind: str, value: Any) -> str:
    """The rule `answer` of a constraint under SamplingParams' name, and those that it needs."""
    if kind == "json_schema":
        return f"answer: {json_rule(value)}"
    if kind == "regex":
        return f"answer: ANSWER\nANSWER: /{_literal(value)}/"
    if kind == "choice":
        return "answer: ANSWER\nANSWER: " + " | ".join(json.dumps(choice) for choice in value)
    return f"answer: {nested(value)}"


def nested(grammar: str) -> str:
    """A grammar of its own as a part of another's rule."""
    return "%lark {\n" + grammar + "\n}"


def _literal(expression: str) -> str:
    """A regular expression between slashes."""
    characters, escaped = [], False
    for character in expression:
        characters.append("\\/" if character == "/" and not escaped else "\\n" if character == "\n" else character)
        escaped = character == "\\" and not escaped
    return "".join(characters)


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
        kind = _kind(from_json(stripped, parse_constant=_refuse))
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    fits = kind in kinds_ or (kind == "integer" and "number" in kinds_) or "string" not in kinds_
    return stripped if fits else json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


_END = json.dumps("\n</parameter>\n")
_DEFINITIONS = ("$defs", "definitions")
_OF_OBJECTS = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")
_OF_STRINGS = ("pattern", "format")


def xml_arguments(rule: str, schema: Schema) -> list[str]:
    """The rules of all arguments, the first of which is called `rule`; each parameter in the schema's order.

    InvalidRequestError for what cannot be kept between these marks.
    """
    if found := next((name for name in _OF_OBJECTS if name in schema), None):
        raise InvalidRequestError(f"grammar cannot be compiled: {found} of a function's parameters is not supported")
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        if schema.get("additionalProperties") is False:
            return [f'{rule}: ""']
        name = f"{rule.upper()}_NAME"
        any_ = f'{rule}_any: "<parameter=" {name} ">\\n" {rule}_text'
        return [f"{rule}: {rule}_any*", any_, f"{name}: /[^<>\\n]{{1,128}}/", f"{rule}_text[lazy]: /(?s:.*)/ {_END}"]
    required = schema.get("required")
    needed = set(required) if isinstance(required, list) else set()
    parts = [f"{rule}_{number}{'' if name in needed else '?'}" for number, name in enumerate(properties)]
    rules = [f"{rule}: {' '.join(parts)}"]
    for number, (name, own) in enumerate(properties.items()):
        rules += _parameter(f"{rule}_{number}", name, own, schema)
    return rules


def _parameter(rule: str, name: str, own: Any, root: Schema) -> list[str]:
    begin = json.dumps(f"<parameter={name}>\n")
    known, found = resolved(own, root), kinds(own, root)
    choices = [known["const"]] if "const" in known else known.get("enum")
    if isinstance(choices, list) and choices:
        texts = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
        return [f"{rule}: {begin} ({' | '.join(map(json.dumps, texts))}) {_END}"]
    if not is_text(found) and "string" not in found:
        definitions = {key: root[key] for key in _DEFINITIONS if key in root}
        return [f"{rule}: {begin} {json_rule(json.dumps(definitions | dict(known)))} {_END}"]
    if kept := next((key for key in _OF_STRINGS if key in known), None):
        message = f"{kept} of the parameter {name!r:.80} is not supported in the form in which the model calls"
        raise InvalidRequestError(f"grammar cannot be compiled: {message}")
    return [f"{rule}: {begin} {rule}_text", f"{rule}_text[lazy]: /(?s:.{_count(known)})/ {_END}"]


def _count(known: Schema) -> str:
    least, most = known.get("minLength"), known.get("maxLength")
    if not isinstance(least, int) and not isinstance(most, int):
        return "*"
    return f"{{{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}}}"
