"""What the tools of a chat are for its prompt, for what constrains its answer, and for what is read in it."""

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from hasten.engine.chat import ChatTemplate
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.types import ChatRequest, Function, NamedToolChoice
from hasten.server.tools.forms import HARMONY_CALLS, ToolForm, form_of
from hasten.server.tools.grammar import NO_PARAMETERS, ToolGrammar
from hasten.server.tools.parser import ToolParser
from hasten.server.tools.reader import AnswerReader
from hasten.server.tools.rules import Marks
from hasten.server.tools.xml_parser import XmlToolParser

_MAX_TOOLS = 128
"""Of a request; OpenAI's own limit."""
_MAX_GRAMMAR = 64 << 10
"""Characters of the grammar that all schemas become."""
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_ALPHANUMERIC = string.ascii_letters + string.digits
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def _check_tools(request: ChatRequest) -> None:
    """OpenAIError for tools that no model can be given, and for a choice that is none of them."""
    tools = request.tools or []
    if len(tools) > _MAX_TOOLS:
        raise OpenAIError(f"tools is limited to {_MAX_TOOLS}, got {len(tools)}", param="tools")
    names = set[str]()
    for number, tool in enumerate(tools):
        _check_function(f"tools[{number}].function", tool.function, names)
        names.add(tool.function.name)
    choice = request.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise OpenAIError("tool_choice needs tools", param="tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        message = f"tool_choice names {choice.function.name!r:.80}, which is not one of the tools"
        raise OpenAIError(message, param="tool_choice")


def _check_function(where: str, function: Function, names: set[str]) -> None:
    if not _NAME.fullmatch(function.name):
        message = f"{where}.name must be 1 to 128 letters, digits, '_', '-' and '.', got {function.name!r:.80}"
        raise OpenAIError(message, param="tools")
    if function.name in names:
        raise OpenAIError(f"{where}.name is {function.name!r} again; names must differ", param="tools")
    kind = (function.parameters or {}).get("type", "object")
    if kind != "object":
        raise OpenAIError(f"{where}.parameters must be the schema of an object, got type {kind!r:.80}", param="tools")


@dataclass(frozen=True)
class ToolUse:
    """The tools of one chat and the form in which its model calls them."""

    form: ToolForm
    functions: Sequence[Function]
    choice: str | NamedToolChoice
    several: bool
    """Whether the answer may have several calls."""

    @classmethod
    def of(cls, request: ChatRequest, template: ChatTemplate, parser: str) -> "ToolUse | None":
        """OpenAIError where the tools are not valid; None where nothing is to be called.

        `parser` is the option `tool_call_parser`.
        """
        _check_tools(request)
        if not request.tools or request.tool_choice == "none":
            return None
        functions = [tool.function for tool in request.tools]
        several = request.parallel_tool_calls is not False
        choice = request.tool_choice or "auto"
        return cls(form_of(template, parser), functions, choice, several)

    @cached_property
    def descriptions(self) -> list[dict[str, Any]]:
        """The tools as templates know them, each with a schema."""
        none = dict(NO_PARAMETERS)
        shown = [
            Function(each.name, each.description, none if each.parameters is None else each.parameters)
            for each in self.functions
        ]
        return [{"type": "function", "function": msgspec.to_builtins(function)} for function in shown]

    def constraint(self, given: Mapping[str, Any], marks: Marks) -> Mapping[str, Any]:
        """What the answer keeps to, by SamplingParams' name, in place of what is given beside the tools."""
        if kind := next((kind for kind in given if kind != "json_schema"), None):
            raise OpenAIError(f"{kind} cannot go with tools; use response_format, or tool_choice 'none'", param="tools")
        grammar = self._grammar(given.get("json_schema"), marks)
        if grammar is None:
            return {}
        if len(grammar) > _MAX_GRAMMAR:
            message = f"the schemas of tools have {len(grammar)} characters, the limit is {_MAX_GRAMMAR}"
            raise OpenAIError(message, param="tools")
        return {"grammar": grammar}

    @property
    def max_calls(self) -> int | None:
        """Calls that an answer may have; None: any number."""
        return None if self.several and not isinstance(self.choice, NamedToolChoice) else 1

    def parser(self) -> AnswerReader:
        """What reads one answer."""
        if self.form.is_xml:
            schemas = {function.name: function.parameters for function in self.functions}
            return XmlToolParser(self.form, schemas, self.max_calls)
        return ToolParser(self.form, {function.name for function in self.functions}, self.max_calls)

    def call_id(self) -> str:
        """An id for a call, of the kind that the model's template takes back."""
        if self.form.id_length is not None:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(self.form.id_length))
        return f"call_{secrets.token_hex(12)}"

    def _grammar(self, schema: str | None, marks: Marks) -> str | None:
        named = self.choice.function.name if isinstance(self.choice, NamedToolChoice) else None
        is_required = named is not None or self.choice == "required"
        schemas = {  # of calls that must be written, even where a function is not strict
            each.name: each.parameters if is_required or each.strict else _ANY_OBJECT
            for each in self.functions
            if named in (None, each.name)
        }
        grammar = ToolGrammar(self.form, schemas, marks, several=self.max_calls is None)
        if is_required:
            return grammar.calls()
        if schema is not None:
            return grammar.calls_or_json(schema)
        may_have_several = self.several or self.form is HARMONY_CALLS  # of which an answer has one call anyway
        if may_have_several and not any(function.strict for function in self.functions):
            return None
        return grammar.calls_or_text()
