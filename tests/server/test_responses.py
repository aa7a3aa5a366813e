"""OpenAI's Responses API, asked by the stock openai package: the stateless part, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from tests.server.tool_model import TOOLS

pytestmark = [pytest.mark.any_python, pytest.mark.usefixtures("tool_engine_left_idle")]

CALL_TOOLS: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
COMMON: dict[str, Any] = {"model": "story", "input": "Anna opened the door.", "max_output_tokens": 100}
LOGPROBS = ["message.output_text.logprobs"]
CALLS = {"tools": CALL_TOOLS, "tool_choice": "required", "parallel_tool_calls": False}


def test_a_response_is_the_chats_answer(tool_client: openai.OpenAI) -> None:
    common = COMMON | {"instructions": "Tell.", "max_output_tokens": 9, "extra_body": {"seed": 1}}
    created = tool_client.responses.create(**common)
    messages: Any = [{"role": "system", "content": "Tell."}, {"role": "user", "content": COMMON["input"]}]
    right = tool_client.chat.completions.create(model="story", messages=messages, max_tokens=9, seed=1)
    assert created.output_text == right.choices[0].message.content
    assert created.usage is not None
    assert right.usage is not None
    assert (created.usage.input_tokens, created.usage.output_tokens) == (right.usage.prompt_tokens, 9)
    assert created.usage.total_tokens == right.usage.total_tokens
    assert (created.status, created.output[0].status) == ("incomplete", "incomplete")
    assert created.incomplete_details is not None
    assert created.incomplete_details.reason == "max_output_tokens"
    assert (created.object, created.instructions, created.store, created.error) == ("response", "Tell.", False, None)


def test_calls_and_their_results_go_on(tool_client: openai.OpenAI) -> None:
    created = tool_client.responses.create(**COMMON | CALLS, extra_body={"seed": 2})
    (call,) = created.output
    assert call.type == "function_call"
    assert call.name in ("weather", "clock")
    json.loads(call.arguments)
    assert created.status == "completed"
    history: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": COMMON["input"]}]},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "snow"},
    ]
    answer = tool_client.responses.create(**COMMON | {"input": history, "tools": CALL_TOOLS, "max_output_tokens": 3})
    said = {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": {}}]}
    said["tool_calls"][0]["function"] = {"name": call.name, "arguments": call.arguments}  # type: ignore[index]
    messages: Any = [
        {"role": "user", "content": COMMON["input"]},
        said,
        {"role": "tool", "tool_call_id": call.call_id, "content": "snow"},
    ]
    right = tool_client.chat.completions.create(model="story", messages=messages, tools=TOOLS, max_tokens=3)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert right.usage is not None
    assert answer.usage.input_tokens == right.usage.prompt_tokens


@pytest.mark.parametrize("fields", [{}, CALLS], ids=["text", "call"])
def test_events_add_up_to_the_whole(tool_client: openai.OpenAI, fields: dict[str, Any]) -> None:
    common = COMMON | fields | {"max_output_tokens": 100 if fields else 12, "extra_body": {"seed": 4}}
    whole = tool_client.responses.create(**common)
    events: list[Any] = list(tool_client.responses.create(**common, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    if fields:
        parts = ["function_call_arguments.delta", "function_call_arguments.done"]
        ends = ["output_item.done", "completed"]
    else:
        parts = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
        ends = ["output_item.done", "incomplete"]
    assert kinds == ["created", "in_progress", "output_item.added", *parts, *ends]
    deltas = [event for event in events if event.type.endswith(".delta")]
    assert deltas
    last = events[-1].response
    right, (item,) = whole.output[0], last.output
    assert {event.item_id for event in deltas} == {item.id}
    text = "".join(event.delta for event in deltas)
    if fields:
        assert (item.name, item.arguments) == (right.name, right.arguments)
        assert text == item.arguments
    else:
        assert text == last.output_text == whole.output_text
    assert (last.usage, last.status) == (whole.usage, whole.status)
    assert events[0].response.id == last.id


def test_a_response_has_the_log_probabilities_of_its_chat(tool_client: openai.OpenAI) -> None:
    common: Any = COMMON | {"max_output_tokens": 9, "top_logprobs": 2, "include": LOGPROBS, "extra_body": {"seed": 1}}
    created = tool_client.responses.create(**common)
    messages: Any = [{"role": "user", "content": COMMON["input"]}]
    right = tool_client.chat.completions.create(
        model="story", messages=messages, max_tokens=9, seed=1, logprobs=True, top_logprobs=2
    )
    assert right.choices[0].logprobs is not None
    tokens = [token.model_dump() for token in right.choices[0].logprobs.content or ()]
    item: Any = created.output[0]
    assert [token.model_dump() for token in item.content[0].logprobs] == tokens
    assert len(tokens) == 9
    assert created.top_logprobs == 2
    events: list[Any] = list(tool_client.responses.create(**common, stream=True))
    streamed = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert [(token.token, token.logprob) for token in streamed] == [(each["token"], each["logprob"]) for each in tokens]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [len(token.top_logprobs) for token in done.logprobs] == [2] * 9
    assert events[-1].response.output[0].content == item.content


def check_metrics(metrics: Any, tokens: int) -> None:
    assert all(metrics[name] >= 0 for name in ("time_to_first_token_ms", "generation_time_ms", "queue_time_ms"))
    assert metrics["mean_itl_ms"] * (tokens - 1) == pytest.approx(metrics["generation_time_ms"])
    seconds = (metrics["time_to_first_token_ms"] + metrics["generation_time_ms"]) / 1e3
    assert metrics["tokens_per_second"] == pytest.approx(tokens / seconds)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_the_times_of_their_requests_where_they_are_wanted(
    tool_client: openai.OpenAI, stream: bool
) -> None:
    common: dict[str, Any] = {"model": "story", "max_tokens": 5, "stream": stream, "extra_body": {"ignore_eos": True}}
    if stream:
        common["stream_options"] = {"include_usage": True}
    messages: Any = [{"role": "user", "content": "Anna"}]

    def last(answer: Any) -> Any:
        return list(answer)[-1] if stream else answer

    check_metrics(last(tool_client.completions.create(prompt="Anna", **common)).metrics, 5)
    check_metrics(last(tool_client.chat.completions.create(messages=messages, **common)).metrics, 5)
    asked: dict[str, Any] = {"model": "story", "input": "Anna", "max_output_tokens": 5}
    answer = last(tool_client.responses.create(**asked, stream=stream, extra_body={"ignore_eos": True}))
    check_metrics((answer.response if stream else answer).metrics, 5)
    assert last(tool_client.completions.create(prompt="Anna", n=2, **common)).metrics is None
    assert last(tool_client.completions.create(prompt=["Anna", "Ben"], **common)).metrics is None


class Weather(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    sun: bool


def test_a_response_can_be_parsed_into_a_model(tool_client: openai.OpenAI) -> None:
    parsed = tool_client.responses.parse(**COMMON, text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    assert parsed.text is not None
    with tool_client.responses.stream(**COMMON, text_format=Weather) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Weather)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "store": ({"store": True}, "store", "store is not supported"),
    "previous": ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_id is not supported"),
    "effort": ({"reasoning": {"effort": "low"}}, "reasoning_effort", "reasoning_effort is not supported"),
    "summary": ({"reasoning": {"summary": "auto"}}, "reasoning", "reasoning is not supported"),
    "top logprobs": ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs include to have message.output_text"),
    "logprobs of tools": ({"include": LOGPROBS, "tools": CALL_TOOLS}, "include", "reasoning or calls of tools"),
    "background": ({"background": True}, "background", "background is not supported"),
    "include": ({"include": ["reasoning.encrypted_content"]}, "include", "include is not supported"),
    "truncation": ({"truncation": "auto"}, "truncation", "truncation is not supported"),
    "unknown": ({"extra_body": {"mood": 1}}, "mood", "unknown field `mood`"),
    "tool": ({"tools": [{"type": "web_search"}]}, "tools", "Invalid enum value 'web_search'"),
    "item": ({"input": [{"type": "item_reference", "id": "1"}]}, "input", r"input\[0\] is of type 'item_reference'"),
    "part": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
        "input",
        r"input\[0\].content\[0\] is of type 'input_image'",
    ),
    "message": ({"input": [{"role": "user"}]}, "input", r"input\[0\] must have a role and content"),
    "call": ({"input": [{"type": "function_call", "name": "f"}]}, "input", "must have a name and a call_id"),
    "output": (
        {"input": [{"type": "function_call_output", "output": "f"}]},
        "input",
        "must have a call_id and an output",
    ),
    "model": ({"model": "saga"}, "model", "does not exist"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_supported_is_named(tool_client: openai.OpenAI, name: str) -> None:
    fields, param, message = WRONG[name]
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=message) as caught:
        tool_client.responses.create(**COMMON | fields)
    assert caught.value.body["param"] == param  # type: ignore[index]
