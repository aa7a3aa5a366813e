"""Reasoning apart from answers: how it is read, and what the stock clients of three APIs see of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from tests.server.openai_site import DEMO, Site
from tests.server.reasoning_model import CHANNELS, THINK, serve_channels, serve_thinker
from tests.server.tool_model import TOOLS
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.engine.grammar_text import Vocabulary
from hasten.engine.text import Tokenizer
from hasten.server.openai.reading import TokenSpans, after_reasoning
from hasten.server.tools.harmony import HarmonyReader
from hasten.server.tools.reader import ReasoningPiece, TextPiece, TextReader
from hasten.server.tools.reasoning import HARMONY, ReasoningReader, Stage, joined_text, reasoning_form
from hasten.server.tools.rules import Marks

pytestmark = pytest.mark.any_python

QWEN = reasoning_form("", "qwen3")
R1 = reasoning_form("", "deepseek_r1")
CHAT: Any = [{"role": "user", "content": "Anna opened the door."}]
SCHEMA = {"type": "object", "properties": {"sun": {"type": "boolean"}}, "required": ["sun"]}
SUN: Any = {
    "type": "json_schema",
    "json_schema": {"name": "w", "schema": SCHEMA | {"additionalProperties": False}},
}
CLOSES = {str(THINK["</think>"]): 13.0}
"""A logit bias that ends the demo model's reasoning after some words."""


def read(stage: Stage, text: str, length: int) -> tuple[str, str]:
    """Reasoning and text of an answer that comes in pieces of so many characters."""
    assert QWEN is not None
    reader = ReasoningReader(QWEN, stage, TextReader())
    pieces = [piece for at in range(0, len(text), length) for piece in reader.feed(text[at : at + length])]
    pieces += reader.end()
    return joined_text(pieces, ReasoningPiece), joined_text(pieces, TextPiece)


@pytest.mark.parametrize("length", [1, 3, 1000])
@pytest.mark.parametrize(
    ("stage", "text", "right"),
    [
        (Stage.INSIDE, "Hm, so.\n</think>\n\nYes. ", ("Hm, so.", "Yes. ")),
        (Stage.INSIDE, "\n\n</think>Yes", ("", "Yes")),
        (Stage.INSIDE, "Hm </thin> still", ("Hm </thin> still", "")),
        (Stage.INSIDE, "a</think>b</think>c", ("a", "b</think>c")),
        (Stage.AHEAD, " <think>\nHm.\n</think>\nYes", ("Hm.", "Yes")),
        (Stage.AHEAD, " Yes <think> no", ("", " Yes <think> no")),
        (Stage.AHEAD, "<thinner>", ("", "<thinner>")),
        (Stage.AHEAD, "<thi", ("", "<thi")),
        (Stage.AHEAD, "", ("", "")),
    ],
)
def test_reasoning_is_read_apart(stage: Stage, text: str, right: tuple[str, str], length: int) -> None:
    assert read(stage, text, length) == right


@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "/thi", " ", "\n", "so"]), max_size=12),
    length=st.integers(1, 9),
    stage=st.sampled_from(Stage),
)
def test_any_reasoning_is_read_alike_whole_and_in_pieces(parts: list[str], length: int, stage: Stage) -> None:
    text = "".join(parts)
    assert read(stage, text, length) == read(stage, text, 10_000)


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The demo model's, with or without marks among its tokens."""
    fast = FastTokenizer.from_file(str(DEMO / "tokenizer.json"))
    if request.param == "marks are tokens":
        fast.add_tokens([AddedToken(mark) for mark in (*THINK, *CHANNELS)])
    return Tokenizer(fast)


@given(data=st.data())
def test_tokens_of_reasoning_are_those_whose_text_it_has(tokenizer: Tokenizer, data: st.DataObject) -> None:
    assert QWEN is not None
    parts = st.lists(
        st.sampled_from(["<think>", "</think>", "</", "think", ">", " ", "Hm so", "…", "é\n"]), max_size=12
    )
    ids = [token for part in data.draw(parts) for token in tokenizer.encode(part, add_special_tokens=False)]
    stage = data.draw(st.sampled_from(Stage))
    texts = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    begins = stage is Stage.INSIDE or texts[-1].lstrip().startswith("<think>")
    ended = next((count for count, text in enumerate(texts) if "</think>" in text), len(ids))
    right = ended if begins else 0
    reader, spans = ReasoningReader(QWEN, stage, TextReader()), TokenSpans(tokenizer, skip_special_tokens=True)
    length = data.draw(st.integers(1, 5))
    stream = tokenizer.stream(continues=True)
    for at in range(0, len(ids), length):
        reader.feed("".join(stream.add(token) for token in ids[at : at + length]))
        spans.add(ids[at : at + length])
    reader.feed(stream.flush())
    reader.end()
    assert spans.count(reader.reasoned) == right


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_tokens_of_hidden_channels_count_with_their_headers(tokenizer: Tokenizer, length: int) -> None:
    hidden = ["<|channel|>analysis<|message|>Hm.<|end|>", "<|start|>assistant<|channel|>analysis<|message|>So.<|end|>"]
    final = "<|start|>assistant<|channel|>final<|message|>Yes."
    for parts in ([], hidden[:1], hidden):
        whole = [tokenizer.encode(part, add_special_tokens=False) for part in [*parts, final]]
        ids = [token for part in whole for token in part]
        reader, spans = HarmonyReader(with_calls=False), TokenSpans(tokenizer, skip_special_tokens=False)
        stream = tokenizer.stream(skip_special_tokens=False, continues=True)
        for at in range(0, len(ids), length):
            reader.feed("".join(stream.add(token) for token in ids[at : at + length]))
            spans.add(ids[at : at + length])
        reader.end()
        assert spans.count(reader.reasoned) == sum(map(len, whole[:-1]))


def test_the_template_shows_the_form_and_the_prompt_how_far_it_is() -> None:
    assert QWEN is not None
    assert R1 is not None
    assert reasoning_form("... </think> ...", "auto") is QWEN
    assert reasoning_form("<|channel|>analysis<|message|>", "auto") is HARMONY
    assert reasoning_form("[THINK] [/THINK]", "auto") is reasoning_form("", "mistral")
    assert reasoning_form("{{ messages }}", "auto") is None
    assert reasoning_form("... </think> ...", "none") is None
    assert QWEN.stage("assistant\n<think>\n") is Stage.INSIDE
    assert QWEN.stage("assistant\n<think>\n\n</think>\n\n") is None
    assert QWEN.stage("<think>a</think>\nassistant\n") is Stage.AHEAD
    assert R1.stage("assistant\n") is Stage.INSIDE
    assert QWEN.stage("assistant\n<think>Hm", "<think>Hm") is Stage.INSIDE
    assert QWEN.stage("assistant\nYes", "Yes") is None


@pytest.fixture(scope="module")
def takes(tokenizer: Tokenizer) -> Any:
    """Whether the grammar of a constraint behind reasoning takes an answer."""
    vocabulary = Vocabulary(tokenizer.to_json(), tokenizer.vocab_size, (2,)).load()

    def takes(form: Any, stage: Stage, constraint: dict[str, Any], text: str) -> bool:
        grammar = after_reasoning(constraint, form, stage, Marks(tokenizer.added_tokens, (2,)))
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


@pytest.mark.parametrize(
    ("constraint", "right", "wrong"),
    [
        ({"json_schema": json.dumps(SCHEMA)}, '{"sun": true}', '{"sun": 1}'),
        ({"regex": r"[0-9]+/\d"}, "12/3", "12"),
        ({"choice": ["Yes", 'a "b"']}, 'a "b"', "a"),
        ({"grammar": 'start: word "!"\nword: "Oh" | WORD\nWORD: /[a-z]+/'}, "so!", "So!"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_constraint_holds_for_what_follows_the_reasoning(takes: Any, constraint: Any, right: str, wrong: str) -> None:
    for stage, begin in ((Stage.INSIDE, ""), (Stage.AHEAD, "<think>")):
        assert takes(QWEN, stage, constraint, f"{begin}Hm {{ < 1?\n</think>\n\n{right}")
        assert takes(QWEN, stage, constraint, f"{begin}</think>{right}")
        assert not takes(QWEN, stage, constraint, f"{begin}Hm</think>\n\n{wrong}")
    assert takes(QWEN, Stage.AHEAD, constraint, right)
    assert not takes(QWEN, Stage.INSIDE, constraint, right)
    final = "<|channel|>final<|message|>"
    hidden = "<|channel|>analysis<|message|>Hm { < 1?<|end|><|start|>assistant"
    assert takes(HARMONY, Stage.AHEAD, constraint, f"{final}{right}")
    assert takes(HARMONY, Stage.AHEAD, constraint, f"{hidden}{hidden}{final}{right}")
    assert not takes(HARMONY, Stage.AHEAD, constraint, f"{hidden}{final}{wrong}")


def test_an_unknown_form_of_reasoning_is_refused() -> None:
    assert EngineConfig.create("m").reasoning_parser == "auto"
    with pytest.raises(ConfigError, match="reasoning_parser 'granite' is not supported; there is auto, none"):
        EngineConfig.create("m", reasoning_parser="granite")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = serve_thinker(tmp_path_factory.mktemp("thinker"))
    yield site
    site.close()


@pytest.fixture(scope="module")
def client(thinker: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="none", max_retries=0) as result:
        yield result


COMMON: dict[str, Any] = {"model": "story", "messages": CHAT, "seed": 1, "max_tokens": 150, "logit_bias": CLOSES}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    """The answer to a chat."""
    return client.chat.completions.create(**COMMON | fields)


def test_a_chat_has_its_reasoning_beside_its_content(client: openai.OpenAI) -> None:
    whole = chat(client, response_format=SUN).choices[0]
    message: Any = whole.message
    assert message.reasoning == message.reasoning_content
    assert message.reasoning
    assert "think>" not in message.reasoning
    assert json.loads(message.content)["sun"] in (True, False)
    assert whole.finish_reason == "stop"
    deltas: list[Any] = [piece.choices[0].delta for piece in chat(client, response_format=SUN, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning
    hidden = chat(client, response_format=SUN, extra_body={"include_reasoning": False}).choices[0]
    assert hidden.message.content == message.content
    assert not hasattr(hidden.message, "reasoning")


def reasoned(choice: Any) -> int:
    """Tokens of an answer up to the mark that ends its reasoning, by its log-probabilities."""
    tokens = [entry.token for entry in choice.logprobs.content]
    return tokens.index("</think>") + 1 if "</think>" in tokens else len(tokens)


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"max_tokens": 3}, {"stop": ["\n", "."]}], ids=str)
def test_usage_has_the_tokens_of_the_reasoning(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = chat(client, logprobs=True, **fields)
    counted = whole.usage.completion_tokens_details.reasoning_tokens
    assert 0 < counted == sum(map(reasoned, whole.choices)) <= whole.usage.completion_tokens
    hidden = chat(client, extra_body={"include_reasoning": False}, **fields).usage
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = list(chat(client, stream=True, stream_options=options, **fields))
    assert events[-1].usage == hidden == whole.usage
    shown = [event.usage.completion_tokens_details.reasoning_tokens for event in events]
    assert shown == sorted(shown)


def test_usage_of_an_answer_without_reasoning_has_no_tokens_of_it(client: openai.OpenAI) -> None:
    plain = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    assert chat(client, max_tokens=4, **plain).usage.completion_tokens_details is None


def test_a_response_counts_the_tokens_of_its_reasoning(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "story", "input": CHAT[0]["content"], "max_output_tokens": 40}
    made: Any = client.responses.create(**common, extra_body={"seed": 3, "stop": ["</think>"]})
    assert made.usage.output_tokens_details.reasoning_tokens == made.usage.output_tokens > 0
    *_, last = client.responses.create(**common, extra_body={"seed": 3, "stop": ["</think>"]}, stream=True)
    assert last.response.usage == made.usage


def test_an_answer_that_was_cut_while_it_reasons_has_no_content(client: openai.OpenAI) -> None:
    result = chat(client, max_tokens=4, logit_bias={str(THINK["</think>"]): -100}).choices[0]
    assert (result.finish_reason, result.message.content) == ("length", None)
    assert result.message.reasoning


def test_a_prompt_that_closes_the_reasoning_leaves_an_answer(client: openai.OpenAI) -> None:
    plain = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    result = chat(client, response_format=SUN, **plain).choices[0].message
    assert not hasattr(result, "reasoning")
    assert json.loads(result.content)["sun"] in (True, False)


def test_calls_come_behind_the_reasoning(client: openai.OpenAI) -> None:
    result = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert result.finish_reason == "tool_calls"
    assert result.message.reasoning
    (call,) = result.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "clock" else arguments["city"] in ("Paris", "Oslo")


def test_reasoning_is_history(client: openai.OpenAI, thinker: Site) -> None:
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.", "reasoning": "Hm."}
    answer: Any = client.post(
        f"{thinker.url}/tokenize",
        body={"model": "story", "messages": [*CHAT, said]},
        cast_to=object,
    )
    tokenizer = thinker.engine("tokens").tokenizer
    assert tokenizer is not None
    assert "assistant: (Hm.) Yes." in tokenizer.decode(answer["tokens"])


def test_a_form_can_be_named_or_switched_off(
    client: openai.OpenAI, thinker: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = thinker.engine("tokens")
    monkeypatch.setattr(engine, "config", replace(engine.config, reasoning_parser="none"))
    result = chat(client, max_tokens=8).choices[0].message
    assert result.content
    assert not hasattr(result, "reasoning")


def test_an_effort_needs_a_template_that_knows_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is not supported") as caught:
        chat(client, reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"


def test_a_response_has_an_item_of_reasoning(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {
        "model": "story",
        "input": "Anna opened the door.",
        "max_output_tokens": 40,
        "extra_body": {"seed": 3, "stop": ["</think>"]},
    }
    made: Any = client.responses.create(**common)
    assert [item.type for item in made.output] == ["reasoning"]
    events: list[Any] = list(client.responses.create(**common, stream=True))
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    parts = ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[3:-1] == [*parts, "output_item.done"]
    text = made.output[0].content[0].text
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == text
    back = [{"role": "user", "content": "So?"}, made.output[0].model_dump(), {"role": "assistant", "content": "Yes."}]
    assert client.responses.create(**common | {"input": back}).output


def test_log_probabilities_of_a_response_need_an_answer_of_text_alone(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    with pytest.raises(openai.BadRequestError, match="where the answer may have reasoning") as caught:
        client.responses.create(model="story", input="Anna", include=include)
    assert caught.value.param == "include"


def test_a_message_has_a_block_of_thinking_where_it_is_wanted(thinker: Site) -> None:
    common: dict[str, Any] = {"model": "story", "messages": CHAT, "max_tokens": 40, "extra_body": {"seed": 2}}
    wanted: Any = {"type": "enabled", "budget_tokens": 1024}
    with anthropic.Anthropic(base_url=thinker.url, api_key="none", max_retries=0) as reader:
        whole: Any = reader.messages.create(**common, thinking=wanted)
        assert whole.content[0].type == "thinking"
        with reader.messages.stream(**common, thinking=wanted) as stream:
            streamed: Any = stream.get_final_message()
        assert streamed.content[0].thinking == whole.content[0].thinking
        said = {"role": "assistant", "content": [block.model_dump() for block in whole.content]}
        assert reader.messages.create(**common | {"messages": [*CHAT, said, *CHAT]}, thinking=wanted).content
        hidden: Any = reader.messages.create(**common)
        assert all(block.type == "text" for block in hidden.content)


def test_channels_are_reasoning_calls_and_content(tmp_path: Any) -> None:
    site = serve_channels(tmp_path)
    try:
        with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client:
            bias = {str(CHANNELS["<|end|>"]): 13.0}
            common: Any = {"logit_bias": bias, "reasoning_effort": "low"}
            whole = chat(client, **common, response_format=SUN, logprobs=True)
            result = whole.choices[0]
            tokens = [entry.token for entry in result.logprobs.content]
            hidden = max(at for at, token in enumerate(tokens) if token == "<|start|>")
            assert whole.usage.completion_tokens_details.reasoning_tokens == hidden > 0
            assert json.loads(result.message.content)["sun"] in (True, False)
            assert result.finish_reason == "stop"
            called = chat(client, **common, tools=TOOLS, tool_choice="required").choices[0]
            assert called.finish_reason == "tool_calls"
            (call,) = called.message.tool_calls
            assert call.function.name in ("weather", "clock")
            json.loads(call.function.arguments)
            assert "<|" not in (called.message.reasoning if hasattr(called.message, "reasoning") else "")
            pieces = chat(client, **common, tools=TOOLS, tool_choice="required", stream=True)
            deltas: list[Any] = [piece.choices[0].delta for piece in pieces]
            arguments = "".join(part.function.arguments for delta in deltas for part in delta.tool_calls or ())
            assert arguments == call.function.arguments
    finally:
        site.close()
