"""Anthropic's Messages API: its routes, and their answers as blocks of text and of calls, whole or as events."""

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import HastenError
from hasten.core.text import from_json
from hasten.core.types import SamplingParams
from hasten.server.anthropic.chat import CountRequest, MessagesRequest, as_chat
from hasten.server.errors import MESSAGES_PATH, error_body
from hasten.server.openai.answer import Usage
from hasten.server.openai.blocks import Block, BlockForm, Event
from hasten.server.openai.call import ChatCalls
from hasten.server.openai.choices import ChatOutput
from hasten.server.openai.handling import api_route, error_object, json_response
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading
from hasten.server.tools.reader import CallPiece, Piece, ReasoningPiece

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""Of each type of block: the type of what is new of it, and the field that has it."""


class MessageForm(BlockForm):
    """See AnswerForm."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}

    def error(self, error: HastenError) -> bytes:
        """See AnswerForm."""
        return self._written([msgspec.to_builtins(error_body(MESSAGES_PATH, *error_object(error)))])

    def _answer(self, usage: Usage) -> dict[str, Any]:
        return self._head | {"content": self._blocks} | self._reasons | {"usage": _usage(usage)}

    def _begin(self, usage: Usage) -> Iterable[Event]:
        yield {"type": "message_start", "message": self._answer(usage)}

    def _end(self, usage: Usage) -> Iterable[Event]:
        yield {"type": "message_delta", "delta": self._reasons, "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def _begin_block(self, part: Piece) -> Iterator[Event]:
        block: Block = {"type": "text", "text": ""}
        if isinstance(part, CallPiece):
            block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
        elif isinstance(part, ReasoningPiece):  # the signature would show a server that it is its own
            block = {"type": "thinking", "thinking": "", "signature": ""}
        self._blocks.append(block)
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _more(self, text: str, output: ChatOutput) -> Event:
        kind, field = _DELTAS[self._blocks[-1]["type"]]
        delta = {"type": kind, field: text}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _end_block(self, text: str) -> Iterator[Event]:
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[block["type"]] = text
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    @property
    def _reasons(self) -> dict[str, Any]:
        """Why the answer ended."""
        reason = None if self._last is None else self._last.finish_reason
        stop = None if self._last is None or reason != "stop" else self._last.stop_reason
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": reason and _REASONS.get(reason, reason), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def _object(text: str) -> dict[str, Any]:
    """Arguments as the object that they must be; an empty one where they were cut, or are none."""
    try:
        value = from_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def message_routes(chats: ChatCalls) -> list[Route]:
    """POST /v1/messages and /v1/messages/count_tokens."""

    async def messages(request: Request, body: MessagesRequest) -> Response:
        def form(_: SamplingParams) -> MessageForm:
            return MessageForm(body.model)

        def check(reading: AnswerReading | None) -> None:
            if body.wants_thinking and (reading is None or reading.reasoning is None):
                raise OpenAIError("thinking is not supported by this model; leave it out", param="thinking")

        return await chats.answer(request, as_chat(body), form, check)

    async def count(_: Request, body: CountRequest) -> Response:
        return json_response({"input_tokens": await chats.prompt_tokens(as_chat(body))})

    return [
        api_route(MESSAGES_PATH, "Answer a chat, as a message", MessagesRequest, messages, streams=True),
        api_route(f"{MESSAGES_PATH}/count_tokens", "Count the tokens of a chat", CountRequest, count),
    ]
