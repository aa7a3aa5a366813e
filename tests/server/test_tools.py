"""Tools in chats, asked for by the stock openai package of a real server: grammars make a small model's calls valid."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from tests.server.openai_site import Site
from tests.server.tool_model import CLOCK, TOOL_TEMPLATE, TOOLS, WEATHER
from tests.waiting import LIMIT_S

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.engine.chat import ChatTemplate

pytestmark = [pytest.mark.any_python, pytest.mark.usefixtures("tool_engine_left_idle")]

CHAT: Any = [{"role": "user", "content": "Anna opened the door."}]
COMMON: dict[str, Any] = {"model": "story", "messages": CHAT, "tools": TOOLS, "max_tokens": 120}
NAMED = {"type": "function", "function": {"name": "weather"}}


def check_call(call: Any) -> None:
    """A call of one of the tools, with arguments as its schema has them."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "clock":
        assert arguments == {}
    else:
        assert call.function.name == "weather"
        assert arguments.keys() == {"city", "days"}
        assert arguments["city"] in ("Paris", "Oslo")
        assert 1 <= arguments["days"] <= 9
    assert call.type == "function"
    assert call.id.startswith("call_")


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_must_come_has_arguments_by_its_schema(tool_client: openai.OpenAI, choice: Any) -> None:
    created = tool_client.chat.completions.create(**COMMON, tool_choice=choice, n=2, seed=1, parallel_tool_calls=False)
    for answer in created.choices:
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert answer.message.tool_calls is not None
        (call,) = answer.message.tool_calls
        check_call(call)
        assert choice == "required" or call.function.name == "weather"


def test_several_calls_come_in_one_answer(tool_client: openai.OpenAI) -> None:
    bias = {str(token): -100 for token in (2,)}  # the end comes as late as the grammar lets it
    created = tool_client.chat.completions.create(**COMMON, tool_choice="required", seed=0, logit_bias=bias)
    (answer,) = created.choices
    assert answer.message.tool_calls is not None
    assert len(answer.message.tool_calls) > 1
    for call in answer.message.tool_calls[:-1]:
        check_call(call)
    assert len({call.id for call in answer.message.tool_calls}) == len(answer.message.tool_calls)
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_streamed_call_adds_up_to_the_whole(tool_client: openai.OpenAI, choice: Any) -> None:
    common = COMMON | {"tool_choice": choice, "seed": 3, "n": 2 if choice == "required" else 1, "logprobs": True}
    whole = tool_client.chat.completions.create(**common)
    pieces = list(tool_client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage == whole.usage
    for right in whole.choices:
        own = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].index == right.index]
        assert [piece.delta.role for piece in own] == ["assistant"] + [None] * (len(own) - 1)
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + ["tool_calls"]
        calls: list[Any] = []
        for piece in own:
            for call in piece.delta.tool_calls or []:
                if call.id is not None:
                    assert (call.index, call.type, call.function.arguments) == (len(calls), "function", "")
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
        assert right.message.tool_calls is not None
        assert calls == [[call.function.name, call.function.arguments] for call in right.message.tool_calls]
        assert len(own) > 1
        assert right.logprobs is not None
        streamed = [token for piece in own if piece.logprobs for token in piece.logprobs.content]
        assert streamed == right.logprobs.content


def test_the_clients_own_reader_of_streams_sees_a_call(tool_client: openai.OpenAI) -> None:
    tool: Any = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    with tool_client.chat.completions.stream(
        model="story", messages=CHAT, tools=[tool], tool_choice="required", seed=1, max_tokens=120
    ) as stream:
        kinds = {event.type for event in stream}
        (answer,) = stream.get_final_completion().choices
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert answer.message.tool_calls is not None
    assert answer.message.tool_calls[0].function.parsed_arguments["city"] in ("Paris", "Oslo")  # type: ignore[index]


def test_a_model_that_may_call_answers_with_text(tool_client: openai.OpenAI) -> None:
    common = COMMON | {"seed": 2, "max_tokens": 12}
    output = tool_client.chat.completions.create(**common).choices[0]
    assert output.message.content
    assert output.message.tool_calls is None
    stream = tool_client.chat.completions.create(**common, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == output.message.content
    strict = [WEATHER | {"function": WEATHER["function"] | {"strict": True}}, CLOCK]
    kept = tool_client.chat.completions.create(**common | {"tools": strict}).choices[0]
    assert kept.message.content


def test_a_call_goes_with_an_answer_that_keeps_to_a_schema(tool_client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"sun": {"type": "boolean"}}, "required": ["sun"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "w", "schema": schema | {"additionalProperties": False}},
    }
    tools = [WEATHER | {"function": WEATHER["function"] | {"strict": True}}]
    kinds = set()
    for seed in range(4):
        created = tool_client.chat.completions.create(
            **COMMON | {"tools": tools, "seed": seed}, response_format=form, parallel_tool_calls=False
        )
        message = created.choices[0].message
        kinds.add(created.choices[0].finish_reason)
        if message.tool_calls is None:
            assert json.loads(message.content).keys() == {"sun"}
        else:
            check_call(message.tool_calls[0])
    assert "length" not in kinds


def test_calls_and_their_results_are_history(tool_client: openai.OpenAI, tool_site: Site) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "snow"}]}
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    created = tool_client.chat.completions.create(**COMMON | {"messages": messages, "max_tokens": 4})
    objects = json.loads(
        json.dumps(messages).replace('"{\\"city\\": \\"Oslo\\", \\"days\\": 1}"', '{"city": "Oslo", "days": 1}')
    )
    objects[2]["content"] = "snow"
    nothing = {"parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    tools = [WEATHER, CLOCK | {"function": CLOCK["function"] | nothing}]
    text = ChatTemplate(TOOL_TEMPLATE, {"bos_token": "<s>"}).render(objects, tools=tools)
    assert '"arguments": {"city": "Oslo", "days": 1}}' in text
    assert '"parameters": {"type": "object"' in text
    tokenizer = tool_site.engine("tokens").tokenizer
    assert tokenizer is not None
    assert created.usage is not None
    assert created.usage.prompt_tokens == len(tokenizer.encode(text, add_special_tokens=False))


def test_tools_that_may_not_be_called_are_not_shown(tool_client: openai.OpenAI) -> None:
    without = tool_client.chat.completions.create(model="story", messages=CHAT, max_tokens=4, seed=1)
    created = tool_client.chat.completions.create(**COMMON | {"max_tokens": 4}, seed=1, tool_choice="none")
    assert created.usage == without.usage
    assert created.choices[0].message.content == without.choices[0].message.content


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "kind": (
        {"tools": [{"type": "web_search"}]},
        "tools",
        r"Invalid enum value 'web_search' - at `\$.tools\[0\].type`",
    ),
    "name": ({"tools": [function(name="a b")]}, "tools", r"tools\[0\].function.name must be 1 to 128 letters"),
    "twice": ({"tools": [function(), function()]}, "tools", r"tools\[1\].function.name is 'f' again"),
    "many": (
        {"tools": [function(name=f"f{number}") for number in range(129)]},
        "tools",
        "tools is limited to 128, got 129",
    ),
    "no object": ({"tools": [function(parameters={"type": "string"})]}, "tools", "must be the schema of an object"),
    "schema": (
        {"tools": [function(parameters={"properties": {"a": {"type": "text"}}})], "tool_choice": "required"},
        "tools",
        "tools cannot be compiled: failed to compile JSON schema: Invalid type: text$",
    ),
    "expression": (
        {"tools": [function(parameters={"properties": {"a": {"pattern": "("}}})], "tool_choice": "required"},
        "tools",
        "tools cannot be compiled: ",
    ),
    "size": (
        {"tools": [function(parameters={"enum": ["x" * 70_000]})], "tool_choice": "required"},
        "messages",
        "the messages and tools have 7.... characters",
    ),
    "choice": (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "names 'g', which is not",
    ),
    "mode": ({"tool_choice": "any"}, "tool_choice", "Invalid enum value 'any'"),
    "none": ({"tools": None, "tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
    "two constraints": (
        {"extra_body": {"guided_regex": "a"}},
        "tools",
        "regex cannot go with tools; use response_format",
    ),
    "arguments": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}],
                }
            ]
        },
        "messages",
        r"messages\[0\].tool_calls\[0\].function.arguments is not valid JSON",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_tools_is_named(tool_client: openai.OpenAI, name: str) -> None:
    fields, param, message = WRONG[name]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        tool_client.chat.completions.create(**COMMON | fields)
    assert caught.value.body["param"] == param  # type: ignore[index]


@pytest.mark.parametrize(("parser", "key"), [("llama3_json", "parameters"), ("mistral", "arguments")])
def test_the_form_of_calls_can_be_named(
    tool_client: openai.OpenAI, tool_site: Site, monkeypatch: pytest.MonkeyPatch, parser: str, key: str
) -> None:
    engine = tool_site.engine("tokens")
    assert engine.config.tool_call_parser == "auto"
    monkeypatch.setattr(engine, "config", replace(engine.config, tool_call_parser=parser))
    common = COMMON | {"tool_choice": "required", "seed": 1, "parallel_tool_calls": False}
    answer = tool_client.chat.completions.create(**common).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    json.loads(call.function.arguments)
    assert len(call.id) == 9 if parser == "mistral" else call.id.startswith("call_")
    written = tool_client.chat.completions.create(**common, logprobs=True).choices[0].logprobs
    assert written is not None
    text = "".join(token.token for token in written.content or ())
    assert text.startswith("[TOOL_CALLS][{" if parser == "mistral" else "{")
    assert f'"{key}": ' in text


def test_an_unknown_form_is_refused() -> None:
    assert EngineConfig.create("m", tool_call_parser="mistral").tool_call_parser == "mistral"
    with pytest.raises(ConfigError, match="tool_call_parser 'pythonic' is not supported; there is auto, hermes"):
        EngineConfig.create("m", tool_call_parser="pythonic")


@pytest.mark.parametrize("depth", [200, 960, 100_000])
def test_what_is_nested_too_deeply_is_the_clients_fault(tool_site: Site, depth: int) -> None:
    deep = '{"a":' * depth + "{}" + "}" * depth
    head = '{"model":"story","messages":[{"role":"user","content":"a"}]'
    bodies = {
        "chat/completions": f'{head},"tools":[{{"type":"function","function":{{"name":"f","parameters":{deep}}}}}]',
        "messages": f'{head},"max_tokens":2,"tools":[{{"name":"f","input_schema":{deep}}}]',
        "responses": f'{{"model":"story","input":"a","tools":[{{"type":"function","name":"f","parameters":{deep}}}]',
    }
    for path, body in bodies.items():
        choice = '{"type":"any"}' if path == "messages" else '"required"'
        content = f'{body},"tool_choice":{choice}}}'.encode()
        answer = httpx.post(f"{tool_site.url}/v1/{path}", content=content, timeout=LIMIT_S)
        assert answer.status_code == 400, answer.text


def test_a_template_without_tools_is_named(tool_client: openai.OpenAI, tool_site: Site, monkeypatch: Any) -> None:
    monkeypatch.setattr(ChatTemplate, "takes_tools", False)
    with pytest.raises(openai.BadRequestError, match="its chat template has no room for them"):
        tool_client.chat.completions.create(**COMMON)
