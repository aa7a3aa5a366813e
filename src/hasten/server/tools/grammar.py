"""Grammars of answers that call tools, in llguidance's Lark syntax: the model's own form, with arguments by schema."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hasten.engine.text import AddedToken
from hasten.server.tools.forms import HARMONY_CALLS, ToolForm
from hasten.server.tools.harmony import HarmonyGrammar
from hasten.server.tools.rules import json_rule, mark_rule, xml_arguments

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function that says nothing of its arguments."""


@dataclass(frozen=True)
class GrammarFunction:
    """A function as grammars know it."""

    name: str
    schema: Mapping[str, Any] | None
    """Of its arguments; None: it has none."""


class ToolGrammar:
    """Grammars for some functions; `tokens` are the tokenizer's added ones, which marks may be."""

    def __init__(
        self,
        form: ToolForm,
        functions: Sequence[GrammarFunction],
        tokens: Mapping[str, AddedToken],
        end_tokens: Sequence[int],
        *,
        several: bool,
    ) -> None:
        self._form = form
        self._functions = functions
        self._tokens = tokens
        self._end_tokens = end_tokens
        self._several = several and not form.is_single
        self._mark = partial(mark_rule, tokens=tokens)
        self._opening = self._mark(form.opening)
        self._harmony = HarmonyGrammar(tokens, end_tokens) if form is HARMONY_CALLS else None

    def calls(self) -> str:
        """At least one call, and nothing else; one alone unless `several`."""
        if self._harmony is not None:
            return self._harmony.calls(*self._in_channels())
        return "\n".join(["start: calls", *self._rules("" if self._form.begins_bare else self._opening)])

    def calls_or_json(self, schema: str) -> str:
        """At least one call, behind the form's mark, or a value by a JSON schema."""
        answer = f"answer: {json_rule(schema)}"
        if self._harmony is not None:
            return self._harmony.calls(*self._in_channels(), answer)
        return "\n".join(["start: calls | answer", answer, *self._rules(self._opening)])

    def calls_or_text(self) -> str:
        """Any text, with calls behind it or instead of it."""
        if self._harmony is not None:
            return self._harmony.calls(*self._in_channels(), self._harmony.text)
        token = self._tokens.get(self._form.opening)
        if self._form.begins_bare:
            text = [f"text: {self._opening}? FIRST REST?", r"FIRST: /[^{\s]/", "REST: /(?s:.+)/"]
            return "\n".join(["start: calls | text?", *text, *self._rules("")])
        if token is not None:
            excluded = ",".join(str(number) for number in sorted({token.number, *self._end_tokens}))
            return "\n".join(["start: text calls?", f"text: <[^{excluded}]>*", *self._rules(self._opening)])
        text = ["ANY: /(?s:.*)/", f"head[lazy]: ANY {self._opening}"]
        start = "start: (head calls)* ANY" if self._several else "start: ANY | head calls"
        return "\n".join([start, *text, *self._rules("")])

    def _rules(self, opening: str) -> list[str]:
        """The rule of all calls, each behind `opening`, and those that it needs."""
        form = self._form
        names = " | ".join(f"call{number}" for number in range(len(self._functions)))
        rules = [f"call: {names}"]
        if form.is_list and not form.between:
            more = ' (", " call)*' if self._several else ""
            rules.append(f'calls: {opening} "[" call{more} "]"')
            opening = ""
        else:  # text between the calls has its own mark where theirs is not given
            separator = r'"\n" ' if form.closing else ""
            rules.append(f"calls: call ({separator}call)*" if self._several and opening else "calls: call")
        return rules + [self._call(number, function, opening) for number, function in enumerate(self._functions)]

    def _in_channels(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Names of functions with the rules of their arguments, and those rules."""
        names = [(function.name, f"arguments{number}") for number, function in enumerate(self._functions)]
        return names, [f"arguments{number}: {_json(function)}" for number, function in enumerate(self._functions)]

    def _call(self, number: int, function: GrammarFunction, opening: str) -> str:
        form = self._form
        name, arguments = json.dumps(function.name), f"arguments{number}"
        if form.is_xml:
            begin, end = json.dumps(f"\n<function={function.name}>\n"), '"</function>\\n"'
            call = f"call{number}: {opening} {begin} {arguments} {end} {self._mark(form.closing)}"
            return "\n".join([call, *xml_arguments(arguments, _schema(function))])
        if form.between:
            call = f"{opening} {name} {self._mark(form.between)} {arguments}"
        else:
            begin = json.dumps(f'{{"name": {name}, "{form.arguments_key}": ')
            call = f'{begin} {arguments} "}}"'
            if form.closing:
                call = f'"\\n" {call} "\\n" {self._mark(form.closing)}'
            call = f"{opening} {call}"
        return f"call{number}: {call}\n{arguments}: {_json(function)}"


def _schema(function: GrammarFunction) -> Mapping[str, Any]:
    return {"type": "object"} | dict(NO_PARAMETERS if function.schema is None else function.schema)


def _json(function: GrammarFunction) -> str:
    return json_rule(json.dumps(_schema(function)))
