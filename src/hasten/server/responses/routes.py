"""OpenAI's Responses API: its route, and answers as items of text and of calls, whole or as events."""

import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import HastenError
from hasten.core.types import SamplingParams
from hasten.server.openai.answer import Usage
from hasten.server.openai.blocks import Block, BlockForm, Event
from hasten.server.openai.call import ChatCalls
from hasten.server.openai.choices import ChatOutput, ChatToken
from hasten.server.openai.handling import api_route, error_object
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading
from hasten.server.responses.chat import LOGPROBS, ResponsesRequest, as_chat
from hasten.server.tools.reader import CallPiece, Piece, ReasoningPiece, TextPiece

_ITEMS: dict[type[Piece], tuple[str, dict[str, Any]]] = {
    TextPiece: ("msg", {"type": "message", "role": "assistant"}),
    ReasoningPiece: ("rs", {"type": "reasoning", "summary": []}),
    CallPiece: ("fc", {"type": "function_call"}),
}
"""What each part of an answer is as an item: how its id begins, and its own fields."""
_TEXTS = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
"""What the text of each type of item is called."""


class ResponseForm(BlockForm):
    """See AnswerForm. With `params` the answer has the times of the request."""

    def __init__(self, body: ResponsesRequest, params: SamplingParams | None = None) -> None:
        super().__init__()
        self._request = body
        self._params = params
        self._id = f"resp_{secrets.token_hex(24)}"
        self._created = int(time.time())
        self._tokens: list[ChatToken] = []
        """Of the last item's text, where their log-probabilities are wanted."""

    def error(self, error: HastenError) -> bytes:
        """See AnswerForm."""
        said = error_object(error)[1]
        return self._written([{"type": "error", "code": said.code, "message": said.message, "param": said.param}])

    def _answer(self, usage: Usage) -> dict[str, Any]:
        return self._response(self._status, usage)

    def _begin(self, usage: Usage) -> Iterable[Event]:
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response("in_progress")}

    def _end(self, usage: Usage) -> Iterable[Event]:
        yield {"type": f"response.{self._status}", "response": self._answer(usage)}

    def _begin_block(self, part: Piece) -> Iterator[Event]:
        prefix, fields = _ITEMS[type(part)]
        item = {"id": f"{prefix}_{secrets.token_hex(24)}", "status": "in_progress", **fields}
        if isinstance(part, CallPiece):
            item |= {"call_id": part.id, "name": part.name, "arguments": ""}
        else:
            item["content"] = []
        self._tokens = []
        self._blocks.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self._blocks) - 1, "item": item}
        if not isinstance(part, CallPiece):
            yield {"type": "response.content_part.added", **self._position, "part": self._part("")}

    def _more(self, text: str, output: ChatOutput) -> Event:
        kind = self._blocks[-1]["type"]
        event = {"type": f"response.{_TEXTS[kind]}.delta", **self._position, "delta": text}
        if kind == "message":
            self._tokens += output.tokens
            event["logprobs"] = output.tokens
        return event

    def _end_block(self, text: str) -> Iterator[Event]:
        item = self._blocks[-1]
        kind, item["status"] = item["type"], self._status
        done = {"type": f"response.{_TEXTS[kind]}.done", **self._position}
        if kind == "function_call":
            item["arguments"] = text
            yield done | {"name": item["name"], "arguments": text}
        else:
            part = self._part(text)
            item["content"] = [part]
            yield done | {name: part[name] for name in ("text", "logprobs") if name in part}
            yield {"type": "response.content_part.done", **self._position, "part": part}
        yield {"type": "response.output_item.done", "output_index": len(self._blocks) - 1, "item": item}

    def _part(self, text: str) -> Block:
        """The only part of the last item's content."""
        kind = self._blocks[-1]["type"]
        part = {"type": _TEXTS[kind], "text": text}
        return part if kind == "reasoning" else part | {"annotations": [], "logprobs": self._tokens}

    @property
    def _position(self) -> dict[str, Any]:
        item = self._blocks[-1]
        position = {"item_id": item["id"], "output_index": len(self._blocks) - 1}
        return position if item["type"] == "function_call" else position | {"content_index": 0}

    @property
    def _status(self) -> str:
        is_cut = self._last is not None and self._last.finish_reason == "length"
        return "incomplete" if is_cut else "completed"

    def _numbered(self, event: Event) -> Event:
        return event | {"sequence_number": self._events}

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
            "output": self._blocks,
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


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def responses_route(chats: ChatCalls, *, with_metrics: bool) -> Route:
    """POST /v1/responses. `with_metrics`: answers have the times of their requests."""

    async def responses(request: Request, body: ResponsesRequest) -> Response:
        def form(params: SamplingParams) -> ResponseForm:
            return ResponseForm(body, params if with_metrics else None)

        def check(reading: AnswerReading | None) -> None:
            if body.with_logprobs and reading is not None:
                message = f"include cannot have {LOGPROBS} where the answer may have reasoning or calls of tools"
                raise OpenAIError(message, param="include")

        return await chats.answer(request, as_chat(body), form, check)

    return api_route("/v1/responses", "Answer a chat, as a response", ResponsesRequest, responses, streams=True)
