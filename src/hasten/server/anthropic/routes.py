"""Anthropic's Messages API: its routes, and their answers as blocks of text and of calls, whole or as events."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import HastenError
from hasten.core.types import SamplingParams
from hasten.server.anthropic.chat import CountRequest, MessagesRequest, as_chat
from hasten.server.errors import message_error
from hasten.server.openai.answer import Usage
from hasten.server.openai.call import ChatCalls
from hasten.server.openai.choices import ChatChoice, ChatMessageOut, ChatPiece, Choice
from hasten.server.openai.errors import error_answer, guarded, json_response, read_body
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading
from hasten.server.openapi.operation import Operation

_encode = msgspec.json.Encoder().encode
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
Event = dict[str, Any]


def message_error_answer(error: Exception) -> tuple[int, bytes]:
    """HTTP status and body for an error."""
    status, body = error_answer(error)
    return status, message_error(status, msgspec.json.decode(body)["error"]["message"])


class MessageForm:
    """See AnswerForm."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._begun = False
        self._block: str | None = None
        """Type of the block that has begun."""
        self._blocks = 0
        self._reason: str | None = None
        self._stop: str | None = None

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """See AnswerForm."""
        content: list[Event] = []
        for choice in choices:
            assert isinstance(choice, ChatChoice), "it is a chat's"
            content += _blocks(choice.message)
            self._end(choice)
        choices.clear()
        return _encode(self._message(usage) | {"content": content} | self._end_fields)

    def events(self, pieces: Sequence[Choice], usage: Usage) -> bytes:
        """See AnswerForm."""
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            events.append({"type": "message_start", "message": self._message(usage)})
        for piece in pieces:
            assert isinstance(piece, ChatPiece), "it is a chat's"
            events += self._take(piece.delta)
            self._end(piece)
        return _written(events)

    def end(self, usage: Usage) -> bytes:
        """See AnswerForm."""
        delta = {"type": "message_delta", "delta": self._end_fields, "usage": _usage(usage)}
        return _written([*self._stop_block(), delta, {"type": "message_stop"}])

    def error(self, error: HastenError) -> bytes:
        """See AnswerForm."""
        return b"event: error\ndata: " + message_error_answer(error)[1] + b"\n\n"

    def _take(self, delta: ChatMessageOut) -> Iterator[Event]:
        if delta.reasoning:
            if self._block != "thinking":
                yield from self._start_block(_thinking(""))
            yield self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            if self._block != "text":
                yield from self._start_block({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.content})
        for call in delta.tool_calls or ():
            if call.id is not None:
                yield from self._start_block(
                    {"type": "tool_use", "id": call.id, "name": call.function.name, "input": {}}
                )
            if call.function.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.function.arguments})

    def _start_block(self, block: Mapping[str, Any]) -> Iterator[Event]:
        yield from self._stop_block()
        self._block = block["type"]
        yield {"type": "content_block_start", "index": self._blocks, "content_block": block}

    def _stop_block(self) -> Iterator[Event]:
        if self._block is not None:
            yield {"type": "content_block_stop", "index": self._blocks}
            self._block = None
            self._blocks += 1

    def _delta(self, delta: Mapping[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._blocks, "delta": delta}

    def _end(self, choice: ChatChoice | ChatPiece) -> None:
        if choice.finish_reason is not None:
            self._reason = _REASONS.get(choice.finish_reason, choice.finish_reason)
            if isinstance(choice.stop_reason, str) and choice.finish_reason == "stop":
                self._reason, self._stop = "stop_sequence", choice.stop_reason

    @property
    def _end_fields(self) -> dict[str, Any]:
        return {"stop_reason": self._reason, "stop_sequence": self._stop}

    def _message(self, usage: Usage) -> dict[str, Any]:
        """An answer without content."""
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def _thinking(text: str) -> dict[str, Any]:
    """A block of thinking; its signature would show a server that it is its own."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def _blocks(message: ChatMessageOut) -> Iterator[Event]:
    if message.reasoning:
        yield _thinking(message.reasoning)
    if message.content:
        yield {"type": "text", "text": message.content}
    for call in message.tool_calls or ():
        arguments = _object(call.function.arguments)
        yield {"type": "tool_use", "id": call.id, "name": call.function.name, "input": arguments}


def _object(text: str) -> dict[str, Any]:
    """Arguments as the object that they must be; an empty one where they were cut, or are none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _written(events: Sequence[Event]) -> bytes:
    return b"".join(b"event: " + event["type"].encode() + b"\ndata: " + _encode(event) + b"\n\n" for event in events)


_MESSAGES, _COUNT = msgspec.json.Decoder(MessagesRequest), msgspec.json.Decoder(CountRequest)


def message_routes(chats: ChatCalls) -> list[Route]:
    """POST /v1/messages and /v1/messages/count_tokens."""

    async def messages(request: Request) -> Response:
        body = await read_body(request, _MESSAGES)

        def form(_: SamplingParams) -> MessageForm:
            return MessageForm(body.model)

        def check(reading: AnswerReading | None) -> None:
            if body.wants_thinking and (reading is None or reading.reasoning is None):
                raise OpenAIError("thinking is not supported by this model; leave it out", param="thinking")

        return await chats.answer(request, as_chat(body), form, check)

    async def count(request: Request) -> Response:
        body = await read_body(request, _COUNT)
        return json_response(msgspec.json.encode({"input_tokens": await chats.prompt_tokens(as_chat(body))}))

    answered = Operation("Answer a chat, as a message", MessagesRequest, streams=True)
    counted = Operation("Count the tokens of a chat", CountRequest)
    return [
        Route("/v1/messages", guarded(messages, answered, message_error_answer), methods=["POST"]),
        Route("/v1/messages/count_tokens", guarded(count, counted, message_error_answer), methods=["POST"]),
    ]
