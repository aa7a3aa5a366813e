"""Grammars of answers that call tools, in llguidance's Lark syntax: the model's own form, with arguments by schema."""

import json
from collections.abc import Mapping
from typing import Any

from hasten.server.tools.forms import HARMONY_CALLS, ToolForm
from hasten.server.tools.harmony import HarmonyGrammar
from hasten.server.tools.rules import Marks, Schema, json_rule, xml_arguments

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function that says nothing of its arguments."""


class ToolGrammar:
    """Grammars for some functions: schemas of their arguments by their names; None: a function has no arguments."""

    def __init__(self, form: ToolForm, functions: Mapping[str, Schema | None], marks: Marks, *, several: bool) -> None:
        self._form = form
        self._schemas = {
            name: {"type": "object"} | dict(NO_PARAMETERS if schema is None else schema)
            for name, schema in functions.items()
        }
        self._arguments = {name: json_rule(json.dumps(schema)) for name, schema in self._schemas.items()}
        self._marks = marks
        self._several = several and not form.is_single
        self._opening = marks.rule(form.opening)
        self._harmony = HarmonyGrammar(marks) if form is HARMONY_CALLS else None

    def calls(self) -> str:
        """At least one call, and nothing else; one alone unless `several`."""
        if self._harmony is not None:
            return self._harmony.calls(self._arguments)
        return "\n".join(["start: calls", *self._rules("" if self._form.begins_bare else self._opening)])

    def calls_or_json(self, schema: str) -> str:
        """At least one call, behind the form's mark, or a value by a JSON schema."""
        answer = f"answer: {json_rule(schema)}"
        if self._harmony is not None:
            return self._harmony.calls(self._arguments, answer)
        return "\n".join(["start: calls | answer", answer, *self._rules(self._opening)])

    def calls_or_text(self) -> str:
        """Any text, with calls behind it or instead of it."""
        if self._harmony is not None:
            return self._harmony.calls(self._arguments, self._harmony.text)
        if self._form.begins_bare:
            text = [f"text: {self._opening}? FIRST REST?", r"FIRST: /[^{\s]/", "REST: /(?s:.+)/"]
            return "\n".join(["start: calls | text?", *text, *self._rules("")])
        if self._form.opening in self._marks.tokens:
            text = [f"text: {self._marks.text_without(self._form.opening)}"]
            return "\n".join(["start: text calls?", *text, *self._rules(self._opening)])
        text = ["ANY: /(?s:.*)/", f"head[lazy]: ANY {self._opening}"]
        start = "start: (head calls)* ANY" if self._several else "start: ANY | head calls"
        return "\n".join([start, *text, *self._rules("")])

    def _rules(self, opening: str) -> list[str]:
        """The rule of all calls, each behind `opening`, and those that it needs."""
        form = self._form
        names = " | ".join(f"call{number}" for number in range(len(self._schemas)))
        rules = [f"call: {names}"]
        if form.is_list and not form.between:
            more = ' (", " call)*' if self._several else ""
            rules.append(f'calls: {opening} "[" call{more} "]"')
            opening = ""
        else:  # text between the calls has its own mark where theirs is not given
            separator = r'"\n" ' if form.closing else ""
            rules.append(f"calls: call ({separator}call)*" if self._several and opening else "calls: call")
        return rules + [self._call(number, name, opening) for number, name in enumerate(self._schemas)]

    def _call(self, number: int, name: str, opening: str) -> str:
        form, arguments = self._form, f"arguments{number}"
        if form.is_xml:
            begin, end = json.dumps(f"\n<function={name}>\n"), '"</function>\\n"'
            call = f"call{number}: {opening} {begin} {arguments} {end} {self._marks.rule(form.closing)}"
            return "\n".join([call, *xml_arguments(arguments, self._schemas[name])])
        if form.between:
            call = f"{opening} {json.dumps(name)} {self._marks.rule(form.between)} {arguments}"
        else:
            begin = json.dumps(f'{{"name": {json.dumps(name)}, "{form.arguments_key}": ')
            call = f'{begin} {arguments} "}}"'
            if form.closing:
                call = f'"\\n" {call} "\\n" {self._marks.rule(form.closing)}'
            call = f"{opening} {call}"
        return f"call{number}: {call}\n{arguments}: {self._arguments[name]}"
