"""Grammar rules of a function's arguments in the form of Qwen3-Coder."""

import json
from collections.abc import Mapping
from typing import Any

from hasten.core.errors import InvalidRequestError
from hasten.server.tools.rules import json_rule
from hasten.server.tools.xml_values import Schema, is_text, kinds, resolved

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
