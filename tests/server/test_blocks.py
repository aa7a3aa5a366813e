"""Answers as blocks: a whole answer has those of its stream, in the order in which the model began them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from hasten.server.anthropic.routes import MessageForm
from hasten.server.openai.answer import Usage
from hasten.server.openai.blocks import BlockForm
from hasten.server.openai.choices import ChatOutput
from hasten.server.responses.chat import ResponsesRequest
from hasten.server.responses.routes import ResponseForm
from hasten.server.tools.reader import CallPiece, Piece, ReasoningPiece, TextPiece

PARTS: list[Piece] = [
    ReasoningPiece("Hm"),
    ReasoningPiece("."),
    CallPiece(0, "weather", "", "call_1"),
    CallPiece(0, None, '{"city": '),
    CallPiece(0, None, '"Oslo"}'),
    CallPiece(1, "clock", "", "call_2"),
    CallPiece(1, None, "{}"),
    TextPiece("So"),
    TextPiece(" it is."),
    CallPiece(2, "clock", "", "call_3"),
]
MESSAGE = [
    ("thinking", "Hm."),
    ("tool_use", {"city": "Oslo"}),
    ("tool_use", {}),
    ("text", "So it is."),
    ("tool_use", {}),
]
RESPONSE = [
    ("reasoning", "Hm."),
    ("function_call", '{"city": "Oslo"}'),
    ("function_call", "{}"),
    ("message", "So it is."),
    ("function_call", ""),
]


def form(api: str) -> BlockForm:
    return MessageForm("m") if api == "messages" else ResponseForm(ResponsesRequest(model="m", input="a"))


def output(parts: list[Piece], reason: str | None) -> ChatOutput:
    return ChatOutput(0, parts, None, reason, msgspec.UNSET)


def streamed(api: str, length: int) -> list[dict[str, Any]]:
    """The events of an answer whose parts come a few at a time."""
    writer, usage, data = form(api), Usage(), b""
    for at in range(0, len(PARTS), length):
        parts = PARTS[at : at + length]
        data += writer.events([output(parts, "tool_calls" if at + length >= len(PARTS) else None)], usage)
    data += writer.end(usage)
    return [json.loads(event.partition(b"\ndata: ")[2]) for event in data.split(b"\n\n")[:-1]]


def contents(blocks: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Type and content of each block."""

    def content(block: dict[str, Any]) -> Any:
        if isinstance(block.get("content"), list):
            return "".join(part["text"] for part in block["content"])
        return next(block[name] for name in ("input", "arguments", "thinking", "text") if name in block)

    return [(block["type"], content(block)) for block in blocks]


@pytest.mark.parametrize("length", [1, 3, 100])
def test_a_response_has_the_items_of_its_stream_in_their_order(length: int) -> None:
    whole = json.loads(form("responses").whole([output(PARTS, "tool_calls")], Usage()))
    assert contents(whole["output"]) == RESPONSE
    events = streamed("responses", length)
    assert contents(events[-1]["response"]["output"]) == RESPONSE
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == list(range(len(RESPONSE)))
    assert contents([event["item"] for event in done]) == RESPONSE
    begun = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert contents(begun) == [(kind, "") for kind, _ in RESPONSE]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["response"]["output"] == []


@pytest.mark.parametrize("length", [1, 3, 100])
def test_a_message_has_the_blocks_of_its_stream_in_their_order(length: int) -> None:
    whole = json.loads(form("messages").whole([output(PARTS, "tool_calls")], Usage()))
    assert (contents(whole["content"]), whole["stop_reason"]) == (MESSAGE, "tool_use")
    events = streamed("messages", length)
    assert events[0]["message"]["content"] == []
    begun = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block.get("id") for block in begun] == [None, "call_1", "call_2", None, "call_3"]
    texts = [""] * len(MESSAGE)
    for event in events:
        if event["type"] == "content_block_delta":
            texts[event["index"]] += "".join(value for name, value in event["delta"].items() if name != "type")
    read = [
        json.loads(text or "{}") if block["type"] == "tool_use" else text
        for block, text in zip(begun, texts, strict=True)
    ]
    assert [(block["type"], content) for block, content in zip(begun, read, strict=True)] == MESSAGE
