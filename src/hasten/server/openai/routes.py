"""OpenAI's API: models, completions and chats over the server's engines, whole or as streams."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import EngineError, HastenError
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient, QueueError
from hasten.server.http_errors import CLIENT_GONE, retry_after
from hasten.server.json_size import check_declared_size
from hasten.server.openai.call import Call
from hasten.server.openai.choices import ChatChoices, completion_choices
from hasten.server.openai.errors import error_answer
from hasten.server.openai.models import Key, Models, models_by_id
from hasten.server.openai.params import (
    Decoded,
    OpenAIError,
    chat_params,
    check_chat,
    completion_params,
    decode,
    queue_timeout,
)
from hasten.server.openai.prompts import ChatPrompts, tokenized
from hasten.server.openai.tokens import DetokenizeRequest, TokenizeRequest, text_of, token_ids
from hasten.server.openai.types import ChatRequest, CompletionRequest, GenerationRequest
from hasten.server.sse import EventStream, unless_gone
from hasten.server.statistics import LanguageCounters
from hasten.server.types import ServiceError

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_COMPLETION, _CHAT = msgspec.json.Decoder(CompletionRequest), msgspec.json.Decoder(ChatRequest)
_TOKENIZE, _DETOKENIZE = msgspec.json.Decoder(TokenizeRequest), msgspec.json.Decoder(DetokenizeRequest)

Handler = Callable[[Request], Awaitable[Response]]


def openai_routes(service: Models) -> list[Route]:
    """The routes of OpenAI's API, and vLLM's for its tokenizers."""
    api = _Api(service)
    return [
        Route("/v1/models", _guarded(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", _guarded(api.model), methods=["GET"]),
        Route("/v1/completions", _guarded(api.completions), methods=["POST"]),
        Route("/v1/chat/completions", _guarded(api.chat), methods=["POST"]),
        Route("/tokenize", _guarded(api.tokenize), methods=["POST"]),
        Route("/detokenize", _guarded(api.detokenize), methods=["POST"]),
        Route("/v1/{path:path}", _guarded(_unknown), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


def _guarded(handler: Handler) -> Handler:
    """A handler whose errors become OpenAI's error objects."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except HTTPException:
            raise
        except Exception as error:
            if not isinstance(error, HastenError):
                _log.exception("%s %s failed", request.method, request.url.path)
            return _error_response(error)

    return guarded


def _error_response(error: Exception) -> Response:
    """The response to a request that failed before its first token."""
    status, body = error_answer(error)
    wait = error.retry_after if isinstance(error, QueueError | ServiceError) else None
    headers = {"retry-after": str(retry_after(wait))} if status in (429, 503) else None
    return Response(body, status, headers, media_type="application/json")


async def _unknown(request: Request) -> Response:
    where = f"{request.method} {request.url.path}"
    if request.url.path in ("/v1/embeddings", "/v1/responses"):
        message = f"{where} is not supported; there are completions and chat/completions"
        raise OpenAIError(message, status=404, code="unknown_url")
    raise OpenAIError(f"unknown request URL: {where}", status=404, code="unknown_url")


@dataclass(frozen=True)
class _Serving:
    """The models that serve."""

    by_id: Mapping[str, Key]
    engines: Mapping[Key, EngineClient]


class _Api:
    def __init__(self, service: Models) -> None:
        self._service = service
        self._created = int(time.time())
        self._prompts = ChatPrompts()
        self._serving: _Serving | None = None
        """Of this turn of the event loop."""

    async def models(self, request: Request) -> Response:
        entries = [self._entry(name) for name in self._served().by_id]
        return _json(_encode({"object": "list", "data": entries}))

    async def model(self, request: Request) -> Response:
        return _json(_encode(self._entry(request.path_params["model"])))

    def _entry(self, name: str) -> dict[str, Any]:
        client, _ = self._find(name)
        made = {"id": name, "object": "model", "created": self._created, "owned_by": "hasten"}
        return made | {"max_model_len": client.info.max_model_len}

    def _find(self, name: str) -> tuple[EngineClient, LanguageCounters | None]:
        self._service.check_open()
        serving = self._served()
        found = serving.by_id
        if name not in found:
            message = f"the model {name!r:.200} does not exist; there are: {', '.join(found) or 'none'}"
            raise OpenAIError(message, status=404, param="model", code="model_not_found")
        key = found[name]
        return serving.engines[key], self._service.counters.of(*key).language

    def _served(self) -> "_Serving":
        """What serves now. All requests that come in one turn of the event loop share it: they come in bursts."""
        if self._serving is None:
            self._serving = _Serving(models_by_id(self._service), self._service.engines())
            asyncio.get_running_loop().call_soon(self._forget)
        return self._serving

    def _forget(self) -> None:
        self._serving = None

    def _find_ready(self, name: str) -> tuple[EngineClient, LanguageCounters | None]:
        client, counters = self._find(name)
        if not client.ready:
            raise EngineError(f"the engine of model {name!r} is not ready; it starts again, try again soon")
        return client, counters

    def _find_any(self, name: str | None) -> EngineClient:
        """The engine of a model; without a name, the only one that there is."""
        found = self._served().by_id
        if name is None and len(set(found.values())) > 1:
            raise OpenAIError(f"give the model; there are: {', '.join(found)}", param="model")
        return self._find(next(iter(found), "") if name is None else name)[0]

    async def tokenize(self, request: Request) -> Response:
        asked = await _asked(request, _TOKENIZE)
        return _json(await token_ids(asked, self._find_any(asked.model), self._prompts))

    async def detokenize(self, request: Request) -> Response:
        asked = await _asked(request, _DETOKENIZE)
        return _json(await text_of(asked, self._find_any(asked.model)))

    async def completions(self, request: Request) -> Response:
        asked = await _asked(request, _COMPLETION)
        client, counters = self._find_ready(asked.model)
        prompts = asked.prompts()
        params = completion_params(asked, len(prompts))
        choices = completion_choices(asked, prompts, params, client.tokenizer)
        timeout = _checked_wait(request, asked, client)
        tokens = await tokenized(prompts, client, "prompt", add_special_tokens=True)
        call = Call(
            asked, client, counters, tokens, params, choices, "text_completion", timeout, asked.shows_prompts_only
        )
        return await _respond(request, call)

    async def chat(self, request: Request) -> Response:
        asked = await _asked(request, _CHAT)
        client, counters = self._find_ready(asked.model)
        check_chat(asked)
        timeout = _checked_wait(request, asked, client)
        tokens = await self._prompts.chat(asked, client)
        params = chat_params(asked, client.info.max_model_len - len(tokens))
        choices = ChatChoices(bool(asked.stream), asked.top_logprobs or 0)
        call = Call(asked, client, counters, [tokens], params, choices, "chat.completion", timeout)
        return await _respond(request, call)


def _checked_wait(request: Request, asked: GenerationRequest, client: EngineClient) -> float | None:
    """Seconds that a request may wait; QueueWaitError, before its prompt costs anything, where that is too short."""
    timeout = queue_timeout(request.headers)
    client.check_wait(asked.priority or 0, timeout)
    return timeout


async def _asked(request: Request, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    """What a body asks for."""
    check_declared_size(request.headers.get("content-length"))
    body = await request.body()
    return await by_size(len(body), decode, body, decoder)


async def _respond(request: Request, call: Call) -> Response:
    """Run a call for as long as its client is there."""
    if not call.request.stream:
        return _json(await unless_gone(request, call.answer()))
    return await EventStream.of(request, call.events())


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
