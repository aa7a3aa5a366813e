"""Calls of tools in the text of an answer: the same however it is cut, and in a time that is linear in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import InvalidRequestError
from hasten.engine.chat import ChatTemplate
from hasten.server.tools.forms import (
    HARMONY_CALLS,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    QWEN_CODER,
    SEED,
    ToolForm,
    form_of,
)
from hasten.server.tools.harmony import HarmonyReader
from hasten.server.tools.parser import ToolParser
from hasten.server.tools.reader import AnswerReader, CallPiece, TextPiece
from hasten.server.tools.xml_parser import XmlToolParser

pytestmark = pytest.mark.any_python
Answer = tuple[str, list[list[str]]]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "s": {"type": "string"},
        "n": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "o": {"$ref": "#/$defs/o"},
        "b": {"enum": [True, False]},
        "x": {"type": ["number", "string"]},
    },
    "$defs": {"o": {"type": "object"}},
}


def reader(form: ToolForm, max_calls: int | None = None) -> AnswerReader:
    """What reads answers that may call f and g."""
    if form is HARMONY_CALLS:
        return HarmonyReader(with_calls=True, max_calls=max_calls)
    if form.is_xml:
        return XmlToolParser(form, {"f": PARAMETERS, "g": None}, max_calls)
    return ToolParser(form, {"f", "g"}, max_calls)


def read(form: ToolForm, text: str, length: int, max_calls: int | None = None) -> Answer:
    """Text and calls of an answer that comes in pieces of so many characters."""
    parser = reader(form, max_calls)
    pieces = [piece for at in range(0, len(text), length) for piece in parser.feed(text[at : at + length])]
    pieces += parser.end()
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                assert piece.number == len(calls)
                calls.append([piece.name, ""])
            calls[piece.number][1] += piece.arguments
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)), calls


F, ODD = ["f", '{"a": 1}'], '{"a": "}\\"</tool_call>\\\\", "b": [[], {"c": null}]}'
TEXT = 'x < "y"\n\n<b>\\é</parameterize>\n'
XML_VALUES = '{"n": null, "o": {}, "b": true, "x": 3}'
THINKS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


def xml(**values: object) -> str:
    """A call of f between Qwen3-Coder's marks."""
    parameters = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<function=f>\n{parameters}</function>"


CASES: list[tuple[ToolForm, str, Answer]] = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', ("", [F])),
    (
        HERMES,
        f'Hm.<tool_call>{{"arguments": {ODD}, "name": "f"}}</tool_call>\n<tool_call>\n',
        ("Hm.\n<tool_call>\n", [["f", ODD]]),
    ),
    (
        HERMES,
        '<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>\n<tool_call>{"name": "new"}</tool_call> So.',
        (" So.", [F, ["new", "{}"]]),
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [F])),
    (HERMES, '<tool_call>{"name": "f", "arguments": null, "x": [3]}</tool_call>', ("", [["f", "{}"]])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": ', ("", [["f", '{"a": ']])),
    (QWEN_CODER, f"<tool_call>\n{xml(a=1)}\n</tool_call>", ("", [F])),
    (SEED, f"<seed:tool_call>{xml(a=1)}</seed:tool_call>", ("", [F])),
    (
        QWEN_CODER,
        f"Hm.\n<tool_call>\n{xml(s=TEXT)}\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>\n",
        ("Hm.\n", [["f", json.dumps({"s": TEXT}, ensure_ascii=False)], ["g", "{}"]]),
    ),
    (QWEN_CODER, f"{xml(n='null', o='{}', b='True', x='3')} So.", (" So.", [["f", XML_VALUES]])),
    (QWEN_CODER, xml(n="nil", a="[1", x="7a", z="1"), ("", [["f", '{"n": "nil", "a": "[1", "x": "7a", "z": "1"}']])),
    (QWEN_CODER, "<tool_call><function=new></tool_call>x", ("x", [["new", "{}"]])),
    (QWEN_CODER, "<tool_call><function=f><parameter=s>\nab", ("", [["f", '{"s": "ab']])),
    (QWEN_CODER, "<function=new></function>", ("<function=new></function>", [])),
    (QWEN_CODER, "<tool_call> <functional> <tool_cal", ("<tool_call> <functional> <tool_cal", [])),
    (HARMONY_CALLS, f'{THINKS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"a": 1}}', ("", [F])),
    (HARMONY_CALLS, ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', ("", [F])),
    (HARMONY_CALLS, " to=functions.g<|channel|>commentary<|message|><|call|>", ("", [["g", "{}"]])),
    (HARMONY_CALLS, f"{THINKS}<|channel|>final<|message|>It <is|>.<|return|>", ("It <is|>.", [])),
    (HARMONY_CALLS, "<|channel|>commentary<|message|>So.<|end|><|start|>assistant<|channel|>fin", ("So.", [])),
    (HARMONY_CALLS, "It is <b>.", ("It is <b>.", [])),
    (HARMONY_CALLS, "toads", ("toads", [])),
    *[
        (form, text, (text, []))
        for form, text in [
            (HERMES, " a <tool_cal b<"),
            (HERMES, "\n \n"),
            (HERMES, ""),
            (HERMES, "<tool_call> none </tool_call>"),
            (HERMES, '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
            (HERMES, '<tool_call>{"name": "f'),
            (HERMES, '<tool_call>{"arguments": 3, "name": "f"}'),
            (HERMES, "<tool_call>{name: f}"),
            (HERMES, '<tool_call>{"' + "x" * 300 + '": 1, "name": "f"}'),
            (LLAMA, '{"age": 3, "name": "f"}'),
            (LLAMA, '{"name": "Anna", "parameters": {"a": 1}} is her'),
            (LLAMA, 'so {"name": "f", "parameters": {"a": 1}}'),
            (LLAMA, "<|python_tag|>search.call(x)"),
            (MISTRAL, "[TOOL_CALLS] none"),
            (MISTRAL, "[TOOL_CALLS][[["),
            (MISTRAL, "[TOOL_CALLS]" + "x" * 2000),
            (MISTRAL, '[TOOL_CALLS][ARGS]{"a": 1}'),
        ]
    ],
    (LLAMA, ' {"name": "f", "parameters": {"a": 1}}', ("", [F])),
    (
        LLAMA,
        '{"type": "function", "name": "f", "parameters": {"a": 1}}; {"name": "g", "arguments": {}}',
        ("", [F, ["g", "{}"]]),
    ),
    (LLAMA, '<|python_tag|>{"name": "new", "parameters": {"a": 1}}', ("", [["new", '{"a": 1}']])),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        ("", [F, ["g", "{}"]]),
    ),
    (MISTRAL, '[TOOL_CALLS]f{"a": 1}', ("", [F])),
    (MISTRAL_NAMED, 'Hm. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]a[ARGS]{}', ("Hm. ", [F, ["g", "{}"]])),
]


@pytest.mark.parametrize(("form", "text", "right"), CASES)
def test_calls_are_the_same_in_any_pieces(form: ToolForm, text: str, right: Answer) -> None:
    for length in (1, 2, 5, 17, 10_000):
        assert read(form, text, length) == right


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
        (QWEN_CODER, f"<tool_call>\n{xml(a=1)}\n</tool_call>"),
        (SEED, f"<seed:tool_call>{xml(a=1)}</seed:tool_call>"),
    ],
    ids=lambda value: value.name if isinstance(value, ToolForm) else "",
)
def test_a_closing_mark_that_is_cut_is_no_text(form: ToolForm, text: str) -> None:
    """As by the limit of tokens."""
    for cut in range(text.rindex("</"), len(text)):
        for length in (1, 10_000):
            assert read(form, text[:cut], length) == ("", [F])


def test_of_more_calls_than_may_be_none_is_given() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert read(HERMES, f"{call}\n{call}{call}done", 3, max_calls=1) == ("done", [F])


WORDS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '"name": "f"', '"arguments": ', "f"]
PARTS = [
    *WORDS,
    "{",
    "}",
    "[",
    "]",
    ",",
    ";",
    ":",
    '"',
    "\\",
    " ",
    "\n",
    "3",
    '{"name": "g", "parameters": {"b": "x"}}',
]


@pytest.mark.parametrize(
    "form",
    [HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, QWEN_CODER, HARMONY_CALLS],
    ids=lambda form: form.name + form.between,
)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=20), length=st.integers(1, 9))
def test_any_text_is_read_alike_whole_and_in_pieces(form: ToolForm, parts: list[str], length: int) -> None:
    text = "".join(parts)
    assert read(form, text, length) == read(form, text, 10_000)


def test_a_channel_without_a_message_is_text() -> None:
    text = "x" * 3000
    for length in (1, 10_000):
        assert read(HARMONY_CALLS, f"<|channel|>{text}<|channel|>final<|message|>So.", length) == (f"{text}\nSo.", [])


def test_what_is_held_back_is_bounded() -> None:
    for form, text in (
        (HERMES, '<tool_call>{"x": "'),
        (HERMES, "<tool_call>"),
        (LLAMA, ""),
        (MISTRAL, "[TOOL_CALLS]"),
    ):
        for unit in (" ", "x", "[", '{"'):
            parser = reader(form)
            given = sum(len(piece.text) for piece in parser.feed(text + unit * 200_000) if isinstance(piece, TextPiece))
            for _ in range(10):
                given += sum(len(piece.text) for piece in parser.feed(unit * 20) if isinstance(piece, TextPiece))
            assert given > 0


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{{ tools }}<tool_call>", HERMES),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]", MISTRAL_NAMED),
        ("{{ tools }}<|python_tag|>", LLAMA),
        ("{{ tools }}<tool_call><function=x>", QWEN_CODER),
        ("{{ tools }}<seed:tool_call><function=x>", SEED),
        ("{{ tools }}<|channel|>analysis<|message|>", HARMONY_CALLS),
        ("""{{ tools }}'{"name": function name, "parameters": {}}'""", LLAMA),
    ],
)
def test_the_template_shows_the_form(source: str, form: ToolForm) -> None:
    assert form_of(ChatTemplate(source, {}), "auto") == form


def test_a_form_that_nothing_shows_has_to_be_named() -> None:
    template = ChatTemplate("{{ tools }}", {})
    with pytest.raises(InvalidRequestError, match="--tool-call-parser, which is one of hermes, llama3_json, mistral"):
        form_of(template, "auto")
    assert form_of(template, "hermes") == HERMES


def test_a_template_of_its_own_for_tools_is_used_with_them(tmp_path: Any) -> None:
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.takes_tools
    assert (template.render([]), template.render([], tools=[{}])) == ("plain", "1 tools")
