"""Rules in llguidance's Lark syntax: of marks, of values by a schema, and of what constrains an answer otherwise."""

import json
from collections.abc import Mapping
from typing import Any

from hasten.core.errors import InvalidRequestError
from hasten.engine.text import AddedToken

_WHITESPACE = {"whitespace_pattern": " "}
"""At most this between JSON's marks, as for all schemas."""


def mark_rule(text: str, tokens: Mapping[str, AddedToken]) -> str:
    """A mark as its token, or as its text where it is none."""
    token = tokens.get(text)
    return json.dumps(text) if token is None else f"<[{token.number}]>"


def json_rule(schema: str) -> str:
    """A value by a JSON schema, with little space in it."""
    try:
        given = json.loads(schema)
    except (ValueError, RecursionError) as error:
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
