"""Grammars of answers that call tools: what they let a model write, and that its own parser reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.server.openai_site import DEMO
from tests.server.tool_model import CLOCK, WEATHER
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from hasten.engine.grammar_text import Vocabulary
from hasten.engine.text import Tokenizer
from hasten.server.tools.forms import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, QWEN_CODER, ToolForm
from hasten.server.tools.grammar import ToolGrammar
from hasten.server.tools.parser import ToolParser
from hasten.server.tools.reader import CallPiece, TextPiece
from hasten.server.tools.rules import Marks
from hasten.server.tools.xml_parser import XmlToolParser

END = 2
FUNCTIONS = {tool["function"]["name"]: tool["function"].get("parameters") for tool in (WEATHER, CLOCK)}
OSLO, NOON = '{"city": "Oslo", "days": 3}', "{}"
ONE = {
    HERMES: f'<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>',
    LLAMA: f'{{"name": "weather", "parameters": {OSLO}}}',
    MISTRAL: f'[TOOL_CALLS][{{"name": "weather", "arguments": {OSLO}}}]',
    MISTRAL_NAMED: f"[TOOL_CALLS]weather[ARGS]{OSLO}",
    QWEN_CODER: "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
}
TWO = {
    HERMES: f'{ONE[HERMES]}\n<tool_call>\n{{"name": "clock", "arguments": {NOON}}}\n</tool_call>',
    LLAMA: f'{ONE[LLAMA]}; {{"name": "clock", "parameters": {NOON}}}',
    MISTRAL: f'{ONE[MISTRAL][:-1]}, {{"name": "clock", "arguments": {NOON}}}]',
    MISTRAL_NAMED: f"{ONE[MISTRAL_NAMED]}[TOOL_CALLS]clock[ARGS]{NOON}",
    QWEN_CODER: f"{ONE[QWEN_CODER]}\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
}
FORMS = list(ONE)


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def vocabulary(request: pytest.FixtureRequest) -> tuple[Tokenizer, LLTokenizer]:
    fast = FastTokenizer.from_file(str(DEMO / "tokenizer.json"))
    if request.param == "marks are tokens":
        fast.add_special_tokens([AddedToken(mark) for mark in ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")])
        fast.add_tokens([AddedToken(mark) for mark in ("<tool_call>", "</tool_call>")])
    tokenizer = Tokenizer(fast)
    return tokenizer, Vocabulary(tokenizer.to_json(), tokenizer.vocab_size, (END,)).load()


class Checker:
    """What a grammar lets a model write."""

    def __init__(self, vocabulary: tuple[Tokenizer, LLTokenizer], form: ToolForm, *, several: bool = True) -> None:
        self._tokenizer, self._vocabulary = vocabulary
        self.grammar = ToolGrammar(form, FUNCTIONS, Marks(self._tokenizer.added_tokens, (END,)), several=several)

    def takes(self, grammar: str, text: str, *, whole: bool = True) -> bool:
        matcher = LLMatcher(self._vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and (matcher.is_accepting() or not whole)


def read(form: ToolForm, text: str) -> tuple[str, list[list[str]]]:
    parser = XmlToolParser(form, FUNCTIONS) if form.is_xml else ToolParser(form, FUNCTIONS)
    pieces = [*parser.feed(text), *parser.end()]
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[-1][1] += piece.arguments
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)), calls


@pytest.mark.any_python
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name + form.between)
def test_calls_that_must_be_written(vocabulary: Any, form: ToolForm) -> None:
    checker = Checker(vocabulary, form)
    grammar = checker.grammar.calls()
    assert checker.takes(grammar, ONE[form])
    assert checker.takes(grammar, TWO[form]) is not form.is_single
    assert read(form, TWO[form]) == ("", [["weather", OSLO], ["clock", NOON]])
    assert not checker.takes(grammar, "")
    assert not checker.takes(grammar, "It is", whole=False)
    assert not checker.takes(grammar, ONE[form].replace("weather", "whether"), whole=False)
    assert not checker.takes(grammar, ONE[form].replace("Oslo", "Rome"), whole=False)
    assert not checker.takes(grammar, ONE[form].replace("3", "10"))
    alone = Checker(vocabulary, form, several=False)
    assert alone.takes(alone.grammar.calls(), ONE[form])
    assert not alone.takes(alone.grammar.calls(), TWO[form], whole=False)


@pytest.mark.any_python
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name + form.between)
def test_calls_behind_text_or_in_place_of_it(vocabulary: Any, form: ToolForm) -> None:
    checker = Checker(vocabulary, form)
    grammar = checker.grammar.calls_or_text()
    text = "Let me see [1] <b>."
    assert checker.takes(grammar, text)
    assert checker.takes(grammar, "")
    assert checker.takes(grammar, TWO[form]) is not form.is_single
    assert not checker.takes(grammar, ONE[form].replace("Oslo", "Rome"), whole=False)
    if not form.begins_bare:
        assert checker.takes(grammar, f"{text}\n{ONE[form]}")
        assert read(form, f"{text}\n{ONE[form]}") == (f"{text}\n", [["weather", OSLO]])
        assert not checker.takes(grammar, f"{text}{ONE[form]}".replace("Oslo", "Rome"), whole=False)
    alone = Checker(vocabulary, form, several=False)
    assert alone.takes(alone.grammar.calls_or_text(), ONE[form])
    assert not alone.takes(alone.grammar.calls_or_text(), TWO[form])


@pytest.mark.any_python
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name + form.between)
def test_calls_or_an_answer_by_a_schema(vocabulary: Any, form: ToolForm) -> None:
    checker = Checker(vocabulary, form)
    schema = {"type": "object", "properties": {"sun": {"type": "boolean"}}, "required": ["sun"]}
    grammar = checker.grammar.calls_or_json(json.dumps(schema | {"additionalProperties": False}))
    assert checker.takes(grammar, '{"sun": true}')
    call = f"{form.opening if form.begins_bare else ''}{ONE[form]}"
    assert checker.takes(grammar, call)
    assert read(form, call) == ("", [["weather", OSLO]])
    assert not checker.takes(grammar, '{"sun": 1}', whole=False)
    assert not checker.takes(grammar, "It is", whole=False)
