"""Selectors of the test's API server.

kubernetes.io/docs/concepts/overview/working-with-objects/labels (equality and sets) and .../field-selectors (a few
fields of each kind, `=`, `==` and `!=`).
"""

import re
from collections.abc import Callable

from tests.cluster.api_server_kinds import Kind, Object, bad_request

Matcher = Callable[[Object], bool]

_TERMS = re.compile(r"(?:[^,()]|\([^)]*\))+")
_SET = re.compile(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)")
_EQUAL = re.compile(r"([^\s=!]+)\s*(==|=|!=)\s*([-A-Za-z0-9_.]*)")
_EXISTS = re.compile(r"(!?)\s*([^\s=!]+)")
_FIELDS = {
    "Pod": ("spec.nodeName", "status.phase"),
    "Event": ("involvedObject.uid", "involvedObject.name", "involvedObject.kind", "reason", "type"),
}


def label_matcher(selector: str) -> Matcher:
    """Whether labels fit all terms of a selector."""
    tests = [_label_term(term.strip()) for term in _TERMS.findall(selector)]
    return lambda one: all(test(one["metadata"].get("labels") or {}) for test in tests)


def _label_term(term: str) -> Callable[[dict[str, str]], bool]:
    if found := _SET.fullmatch(term):
        key, operator, texts = found.groups()
        values = {text.strip() for text in texts.split(",")}
        return lambda labels: (labels.get(key) in values) == (operator == "in")
    if found := _EQUAL.fullmatch(term):
        key, operator, value = found.groups()
        return lambda labels: (labels.get(key) == value) == (operator != "!=")
    if found := _EXISTS.fullmatch(term):
        absent, key = found.groups()
        return lambda labels: (key in labels) != bool(absent)
    raise bad_request(f"unable to parse requirement: {term}")


def field_matcher(kind: Kind, selector: str) -> Matcher:
    """Whether fields fit all terms of a selector; refused for fields that the kind does not offer."""
    tests = []
    for term in filter(None, selector.split(",")):
        name, operator, value = re.fullmatch(r"([\w.]+)(==|=|!=)(.*)", term).groups()  # type: ignore[union-attr]
        if name not in (*_FIELDS.get(kind.kind, ()), "metadata.name", "metadata.namespace"):
            raise bad_request(f'"{name}" is not a known field selector: field label not supported: {name}')
        tests.append((name.split("."), operator != "!=", value))
    return lambda one: all((_field(one, path) == value) == equal for path, equal, value in tests)


def _field(one: Object, path: list[str]) -> str:
    value: object = one
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return str(value or "")
