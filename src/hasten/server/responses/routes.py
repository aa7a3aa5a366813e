"""OpenAI's Responses API: its route, and answers as items of text and of calls, whole or as events."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import HastenError
from hasten.core.types import SamplingParams
from hasten.server.openai.answer import Usage
from hasten.server.openai.call import ChatCalls
from hasten.server.openai.choices import (
    ChatChoice,
    ChatLogprobs,
    ChatMessageOut,
    ChatPiece,
    ChatToken,
    Choice,
    ToolCallOut,
)
from hasten.server.openai.errors import error_answer, guarded, read_body
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading
from hasten.server.openapi.operation import Operation
from hasten.server.responses.chat import LOGPROBS, ResponsesRequest, as_chat

_encode = msgspec.json.Encoder().encode
Item = dict[str, Any]
Event = dict[str, Any]


class ResponseForm:
    """See AnswerForm. With `params` the answer has the times of the request."""

    def __init__(self, body: ResponsesRequest, params: SamplingParams | None = None) -> None:
        self._request = body
        self._params = params
        self._id = f"resp_{secrets.token_hex(24)}"
        self._created = int(time.time())
        self._items: list[Item] = []
        self._texts: list[str] = []
        """Pieces of the text, or of the arguments, of the last item."""
        self._tokens: list[ChatToken] = []
        """Of the last item's text, where their log-probabilities are wanted."""
        self._reason: str | None = None
        self._events = 0

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """See AnswerForm."""
        for choice in choices:
            assert isinstance(choice, ChatChoice), "it is a chat's"
            list(self._take_piece(choice.message, _tokens(choice.logprobs)))
            self._reason = choice.finish_reason
            list(self._finish_item())
        choices.clear()
        return _encode(self._response(self._status, usage))

    def events(self, pieces: Sequence[Choice], usage: Usage) -> bytes:
        """See AnswerForm."""
        events: list[Event] = []
        if self._events == 0:
            events += [{"type": f"response.{kind}", "response": self._response("in_progress")} for kind in _BEGIN]
        for piece in pieces:
            assert isinstance(piece, ChatPiece), "it is a chat's"
            events += self._take_piece(piece.delta, _tokens(piece.logprobs))
            self._reason = piece.finish_reason or self._reason
        return self._written(events)

    def end(self, usage: Usage) -> bytes:
        """See AnswerForm."""
        events = list(self._finish_item())
        status = self._status
        return self._written([*events, {"type": f"response.{status}", "response": self._response(status, usage)}])

    def error(self, error: HastenError) -> bytes:
        """See AnswerForm."""
        said = msgspec.json.decode(error_answer(error)[1])["error"]
        fields = {name: said[name] for name in ("code", "message", "param")}
        return self._written([{"type": "error", **fields}])

    def _take_piece(self, delta: ChatMessageOut, tokens: list[ChatToken]) -> Iterator[Event]:
        if delta.reasoning:
            yield from self._text("reasoning", delta.reasoning)
            yield {"type": "response.reasoning_text.delta", **self._text_position, "delta": delta.reasoning}
        if delta.content or tokens:
            text = str(delta.content or "")
            yield from self._text("message", text)
            self._tokens += tokens
            yield {"type": "response.output_text.delta", **self._text_position, "delta": text, "logprobs": tokens}
        for call in delta.tool_calls or ():
            if call.id is not None:
                yield from self._finish_item()
                yield from self._begin_item(_call(call, "in_progress", ""))
            if call.function.arguments:
                self._texts.append(call.function.arguments)
                arguments = call.function.arguments
                yield {"type": "response.function_call_arguments.delta", **self._call_position, "delta": arguments}

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        """Take text of the last item, or of a new one if that is of another kind."""
        if not self._items or self._items[-1]["type"] != kind:
            yield from self._finish_item()
            yield from self._begin_item(_ITEMS[kind]("in_progress", []))
            yield {"type": "response.content_part.added", **self._text_position, "part": _PARTS[kind]("", ())}
        self._texts.append(text)

    def _begin_item(self, item: Item) -> Iterator[Event]:
        self._items.append(item)
        self._texts.clear()
        self._tokens = []
        yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": dict(item)}

    def _finish_item(self) -> Iterator[Event]:
        """The end of the last item, if one has begun and not ended."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item, text = self._items[-1], "".join(self._texts)
        item["status"] = self._status
        if item["type"] in _PARTS:
            part = _PARTS[item["type"]](text, self._tokens)
            item["content"] = [part]
            done = {"type": f"response.{part['type']}.done", **self._text_position, "text": text}
            yield done if item["type"] == "reasoning" else {**done, "logprobs": self._tokens}
            yield {"type": "response.content_part.done", **self._text_position, "part": part}
        else:
            item["arguments"] = text
            done = {"type": "response.function_call_arguments.done", **self._call_position}
            yield done | {"name": item["name"], "arguments": text}
        yield {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": dict(item)}

    @property
    def _call_position(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    @property
    def _text_position(self) -> dict[str, Any]:
        return {**self._call_position, "content_index": 0}

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _written(self, events: Sequence[Event]) -> bytes:
        written = b""
        for event in events:
            body = _encode(event | {"sequence_number": self._events})
            written += b"event: " + event["type"].encode() + b"\ndata: " + body + b"\n\n"
            self._events += 1
        return written

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        body = self._request
        kept = None if body.text is None else body.text.format
        fields = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"} if kept is None else kept.shown()},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }
        if usage is not None and self._params is not None:
            fields["metrics"] = usage.metrics(self._params)
        return fields


_BEGIN = ("created", "in_progress")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _message(status: str, content: list[Item]) -> Item:
    item_id = f"msg_{secrets.token_hex(24)}"
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str, tokens: Sequence[ChatToken]) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _tokens(logprobs: ChatLogprobs | None) -> list[ChatToken]:
    return [] if logprobs is None else logprobs.content


def _reasoning(status: str, content: list[Item]) -> Item:
    item_id = f"rs_{secrets.token_hex(24)}"
    return {"id": item_id, "type": "reasoning", "status": status, "summary": [], "content": content}


def _reasoning_part(text: str, _: Sequence[ChatToken]) -> Item:
    return {"type": "reasoning_text", "text": text}


_ITEMS = {"message": _message, "reasoning": _reasoning}
_PARTS = {"message": _part, "reasoning": _reasoning_part}
"""Items of text, and what they hold, by their types."""


def _call(call: ToolCallOut, status: str, arguments: str) -> Item:
    head = {"id": f"fc_{secrets.token_hex(24)}", "type": "function_call", "status": status}
    return head | {"call_id": call.id, "name": call.function.name, "arguments": arguments}


_RESPONSES = msgspec.json.Decoder(ResponsesRequest)


def responses_route(chats: ChatCalls, *, with_metrics: bool) -> Route:
    """POST /v1/responses. `with_metrics`: answers have the times of their requests."""

    async def responses(request: Request) -> Response:
        body = await read_body(request, _RESPONSES)

        def form(params: SamplingParams) -> ResponseForm:
            return ResponseForm(body, params if with_metrics else None)

        def check(reading: AnswerReading | None) -> None:
            if body.with_logprobs and reading is not None:
                message = f"include cannot have {LOGPROBS} where the answer may have reasoning or calls of tools"
                raise OpenAIError(message, param="include")

        return await chats.answer(request, as_chat(body), form, check)

    operation = Operation("Answer a chat, as a response", ResponsesRequest, streams=True)
    return Route("/v1/responses", guarded(responses, operation), methods=["POST"])
