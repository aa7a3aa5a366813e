"""Anthropic's Messages API, asked by the stock anthropic package where it is installed, and by httpx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.server.openai_site import Site
from tests.server.tool_model import TOOLS

pytestmark = [pytest.mark.any_python, pytest.mark.usefixtures("tool_engine_left_idle")]

anthropic: Any = pytest.importorskip("anthropic")
SAID = "Anna opened the door."
COMMON: dict[str, Any] = {"model": "story", "messages": [{"role": "user", "content": SAID}], "max_tokens": 100}
MESSAGE_TOOLS = [
    {"name": tool["function"]["name"], "input_schema": tool["function"].get("parameters")} for tool in TOOLS
]
CALLS = {"tools": MESSAGE_TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}


@pytest.fixture(scope="module")
def client(tool_site: Site) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=tool_site.url, api_key="none", max_retries=0) as result:
        yield result


def test_a_message_is_the_chats_answer(client: Any, tool_client: Any) -> None:
    system = [{"type": "text", "text": "Tell.", "cache_control": {"type": "ephemeral"}}]
    created = client.messages.create(**COMMON | {"max_tokens": 9}, system=system, extra_body={"seed": 1})
    messages = [{"role": "system", "content": "Tell."}, *COMMON["messages"]]
    right = tool_client.chat.completions.create(model="story", messages=messages, max_tokens=9, seed=1)
    assert [block.text for block in created.content] == [right.choices[0].message.content]
    assert (created.usage.input_tokens, created.usage.output_tokens) == (right.usage.prompt_tokens, 9)
    assert (created.type, created.role, created.stop_reason, created.stop_sequence) == (
        "message",
        "assistant",
        "max_tokens",
        None,
    )
    counted = client.messages.count_tokens(model="story", messages=COMMON["messages"], system=system)
    assert counted.input_tokens == created.usage.input_tokens


def test_a_stop_sequence_is_named(client: Any, tool_client: Any) -> None:
    common = COMMON | {"max_tokens": 60, "extra_body": {"temperature": 0.0}}
    text = client.messages.create(**common).content[0].text
    assert "." in text
    created = client.messages.create(**common, stop_sequences=["never", "."])
    assert (created.stop_reason, created.stop_sequence) == ("stop_sequence", ".")
    assert created.content[0].text == text.partition(".")[0]
    answer = tool_client.chat.completions.create(**common, stop=["never", "."]).choices[0]
    assert answer.stop_reason == "."
    assert not hasattr(tool_client.chat.completions.create(**common | {"max_tokens": 1}).choices[0], "stop_reason")


def test_calls_and_their_results_go_on(client: Any, tool_client: Any) -> None:
    created = client.messages.create(**COMMON | CALLS, extra_body={"seed": 2})
    (call,) = created.content
    assert (call.type, created.stop_reason) == ("tool_use", "tool_use")
    assert call.name == "clock" or call.input["city"] in ("Paris", "Oslo")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "snow"}]}
    history = [
        *COMMON["messages"],
        {"role": "assistant", "content": [{"type": "text", "text": "So:"}, call.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    answer = client.messages.create(**COMMON | {"messages": history, "tools": MESSAGE_TOOLS, "max_tokens": 3})
    function = {"name": call.name, "arguments": json.dumps(call.input)}
    calls = [{"id": call.id, "type": "function", "function": function}]
    messages = [
        *COMMON["messages"],
        {"role": "assistant", "content": "So:", "tool_calls": calls},
        {"role": "tool", "tool_call_id": call.id, "content": "snow"},
        {"role": "user", "content": "And?"},
    ]
    tools = [
        {"type": "function", "function": {"name": tool["name"], "parameters": tool["input_schema"]}}
        for tool in MESSAGE_TOOLS
    ]
    right = tool_client.chat.completions.create(model="story", messages=messages, tools=tools, max_tokens=3)
    assert answer.usage.input_tokens == right.usage.prompt_tokens


def test_a_named_tool_is_called(client: Any) -> None:
    created = client.messages.create(**COMMON, tools=MESSAGE_TOOLS, tool_choice={"type": "tool", "name": "clock"})
    assert [(block.name, block.input) for block in created.content] == [("clock", {})]
    none = client.messages.create(**COMMON | {"max_tokens": 3}, tools=MESSAGE_TOOLS, tool_choice={"type": "none"})
    assert none.content[0].type == "text"


@pytest.mark.parametrize("fields", [{}, CALLS], ids=["text", "call"])
def test_events_add_up_to_the_whole(client: Any, fields: dict[str, Any]) -> None:
    common = COMMON | fields | {"max_tokens": 100 if fields else 12, "extra_body": {"seed": 4}}
    whole = client.messages.create(**common)
    kinds = [event.type for event in client.messages.create(**common, stream=True)]
    deltas = kinds.count("content_block_delta")
    assert deltas > 0
    middle = ["content_block_start", *["content_block_delta"] * deltas, "content_block_stop"]
    assert kinds == ["message_start", *middle, "message_delta", "message_stop"]
    with client.messages.stream(**common) as stream:
        for _ in stream:
            pass
        last = stream.get_final_message()
    assert (last.stop_reason, last.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert last.usage.input_tokens == whole.usage.input_tokens
    (block,), (right,) = last.content, whole.content
    assert block.text == right.text if not fields else (block.name, block.input) == (right.name, right.input)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking is not supported"),
    "tool": ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, r"tools\[0\] is of type 'web_search_20250305'"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}]}]},
        r"messages\[0\].content\[0\] is of type 'image'",
    ),
    "result": (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "u"}]}]},
        r"messages\[0\].content\[0\] has no tool_use_id",
    ),
    "unknown": ({"extra_body": {"mood": 1}}, "unknown field `mood`"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens must be at least 1"),
    "choice": ({"tools": MESSAGE_TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice names 'x'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_supported_is_named(client: Any, name: str) -> None:
    fields, message = WRONG[name]
    with pytest.raises(anthropic.BadRequestError, match=message) as caught:
        client.messages.create(**COMMON | fields)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_not_found(client: Any, tool_site: Site) -> None:
    with pytest.raises(anthropic.NotFoundError, match="the model 'saga' does not exist") as caught:
        client.messages.create(**COMMON | {"model": "saga"})
    assert caught.value.body["error"]["type"] == "not_found_error"
    answer = httpx.post(f"{tool_site.url}/v1/messages", content=b"x" * (1 << 23))
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "request_too_large"
