"""OpenAI's API: models, completions and chats over the server's engines, whole or as streams."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import EngineError, HastenError
from hasten.engine.chat import ChatTemplate, RenderLimits
from hasten.engine.text import TextTooLongError
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient, EngineInfo
from hasten.server.json_size import check_declared_size
from hasten.server.openai.call import Call
from hasten.server.openai.chat import characters, chat_text
from hasten.server.openai.choices import BestChoices, ChatChoices, CompletionChoices
from hasten.server.openai.models import Models, models_by_id
from hasten.server.openai.params import (
    Decoded,
    OpenAIError,
    chat_params,
    check_chat,
    completion_params,
    decode,
    error_response,
    queue_timeout,
)
from hasten.server.openai.types import ChatRequest, CompletionRequest, GenerationRequest
from hasten.server.sse import EventStream, unless_gone
from hasten.server.statistics import LanguageCounters
from hasten.server.tokenizing import SHORT_TEXT, tokenizing

_CLIENT_LEFT = 499
"""Nobody reads it; it stands in the log."""
_FEW_MESSAGES = 32
"""Which are rendered at once."""
_RENDER_S = 2.0
"""Of CPU time for a chat's prompt, at most."""
_TOKEN_BYTES = 4
_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode

Handler = Callable[[Request], Awaitable[Response]]


def openai_routes(service: Models) -> list[Route]:
    """The routes of OpenAI's API."""
    api = _Api(service)
    return [
        Route("/v1/models", _guarded(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", _guarded(api.model), methods=["GET"]),
        Route("/v1/completions", _guarded(api.completions), methods=["POST"]),
        Route("/v1/chat/completions", _guarded(api.chat), methods=["POST"]),
        Route("/v1/{path:path}", _guarded(_unknown), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


def _guarded(handler: Handler) -> Handler:
    """A handler whose errors become OpenAI's error objects."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        except HTTPException:
            raise
        except Exception as error:
            if not isinstance(error, HastenError):
                _log.exception("%s %s failed", request.method, request.url.path)
            return error_response(error)

    return guarded


async def _unknown(request: Request) -> Response:
    where = f"{request.method} {request.url.path}"
    if request.url.path in ("/v1/embeddings", "/v1/responses"):
        message = f"{where} is not supported; there are completions and chat/completions"
        raise OpenAIError(message, status=404, code="unknown_url")
    raise OpenAIError(f"unknown request URL: {where}", status=404, code="unknown_url")


class _Api:
    def __init__(self, service: Models) -> None:
        self._service = service
        self._created = int(time.time())
        self._templates: WeakKeyDictionary[EngineClient, ChatTemplate | None] = WeakKeyDictionary()

    async def models(self, request: Request) -> Response:
        entries = [self._entry(name) for name in models_by_id(self._service)]
        return _json(_encode({"object": "list", "data": entries}))

    async def model(self, request: Request) -> Response:
        return _json(_encode(self._entry(request.path_params["model"])))

    def _entry(self, name: str) -> dict[str, Any]:
        client, _ = self._find(name)
        made = {"id": name, "object": "model", "created": self._created, "owned_by": "hasten"}
        return made | {"max_model_len": client.info.max_model_len}

    def _find(self, name: str) -> tuple[EngineClient, LanguageCounters | None]:
        self._service.check_open()
        found = models_by_id(self._service)
        if name not in found:
            message = f"the model {name!r:.200} does not exist; there are: {', '.join(found) or 'none'}"
            raise OpenAIError(message, status=404, param="model", code="model_not_found")
        key = found[name]
        return self._service.engines()[key], self._service.counters.of(*key).language

    def _find_ready(self, name: str) -> tuple[EngineClient, LanguageCounters | None]:
        client, counters = self._find(name)
        if not client.ready:
            raise EngineError(f"the engine of model {name!r} is not ready; it starts again, try again soon")
        return client, counters

    async def completions(self, request: Request) -> Response:
        asked = await _asked(request, CompletionRequest)
        client, counters = self._find_ready(asked.model)
        prompts = asked.prompts()
        params = completion_params(asked, len(prompts))
        if asked.echo and client.tokenizer is None:
            raise OpenAIError("echo needs a tokenizer, and the model has none", param="echo")
        timeout = _checked_wait(request, asked, client)
        tokens = await _tokenized(prompts, client, "prompt", add_special_tokens=True)
        hidden = bool(asked.echo) and asked.max_tokens == 0
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        count = 1 if asked.n is None else asked.n
        made = CompletionChoices(count, bool(asked.echo), hidden, client.tokenizer, texts)
        choices = made if params.n == count else BestChoices(made, with_logprobs=asked.logprobs is not None)
        return await _respond(
            request, Call(asked, client, counters, tokens, params, choices, "text_completion", timeout, hidden)
        )

    async def chat(self, request: Request) -> Response:
        asked = await _asked(request, ChatRequest)
        client, counters = self._find_ready(asked.model)
        check_chat(asked)
        template = await self._template(client)
        if template is None:
            raise OpenAIError("the model's tokenizer has no chat template; use /v1/completions")
        timeout = _checked_wait(request, asked, client)
        # The template writes special tokens itself.
        prompt = await _chat_prompt(asked, template, client)
        tokens = await _tokenized([prompt], client, "messages", add_special_tokens=False)
        params = chat_params(asked, client.info.max_model_len - len(tokens[0]))
        choices = ChatChoices(bool(asked.stream), asked.top_logprobs or 0)
        call = Call(asked, client, counters, tokens, params, choices, "chat.completion", timeout)
        return await _respond(request, call)

    async def _template(self, client: EngineClient) -> ChatTemplate | None:
        folder = client.info.tokenizer_folder
        if folder is None:
            raise OpenAIError("the model has no tokenizer; use /v1/completions with token ids")
        if client not in self._templates:
            self._templates[client] = await asyncio.to_thread(ChatTemplate.from_folder, folder)
        return self._templates[client]


def _checked_wait(request: Request, asked: GenerationRequest, client: EngineClient) -> float | None:
    """Seconds that a request may wait; QueueWaitError, before its prompt costs anything, where that is too short."""
    timeout = queue_timeout(request.headers)
    client.check_wait(asked.priority or 0, timeout)
    return timeout


async def _chat_prompt(asked: ChatRequest, template: ChatTemplate, client: EngineClient) -> str:
    """The prompt for a request's messages, rendered where it holds up nobody; nothing is for what must be too long."""
    count, longest = characters(asked), client.most_characters
    if count > longest:
        raise OpenAIError(
            f"the messages have {count} characters; what the model can take has at most {longest}",
            param="messages",
            code="context_length_exceeded",
        )
    limits = RenderLimits(longest, _RENDER_S)
    if count <= SHORT_TEXT and len(asked.messages) <= _FEW_MESSAGES and not asked.chat_template_kwargs:
        return chat_text(asked, template, limits)
    return await tokenizing.run(partial(chat_text, asked, template, limits))


async def _tokenized(
    prompts: Sequence[str | list[int]], client: EngineClient, param: str, *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each prompt; OpenAIError where one of them cannot be served, before any is begun."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and client.tokenizer is None:
        raise OpenAIError("the model has no tokenizer; send token ids", param=param)
    await _check_all([prompt for prompt in prompts if not isinstance(prompt, str)], client.info, param)
    try:
        encoded = await client.tokenize(texts, add_special_tokens=add_special_tokens) if texts else []
    except TextTooLongError as error:
        raise _too_long(error.count, client.info, param) from None
    await _check_all(encoded, client.info, param)
    of_texts = iter(encoded)
    return [next(of_texts) if isinstance(prompt, str) else prompt for prompt in prompts]


async def _check_all(prompts: Sequence[list[int]], info: EngineInfo, param: str) -> None:
    def work() -> None:
        for ids in prompts:
            _check_tokens(ids, info, param)

    await by_size(_TOKEN_BYTES * sum(map(len, prompts)), work)


def _too_long(count: str, info: EngineInfo, param: str) -> OpenAIError:
    message = f"the {param} has {count} tokens; the model's longest sequence has {info.max_model_len}"
    return OpenAIError(message, param=param, code="context_length_exceeded")


def _check_tokens(ids: list[int], info: EngineInfo, param: str) -> None:
    if not ids:
        raise OpenAIError("the prompt has no tokens", param=param)
    if len(ids) >= info.max_model_len:
        raise _too_long(str(len(ids)), info, param)
    if not 0 <= min(ids) <= max(ids) < info.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < info.vocab_size)
        raise OpenAIError(f"the prompt has token id {wrong}; the vocabulary ends at {info.vocab_size - 1}", param=param)


async def _asked(request: Request, kind: type[Decoded]) -> Decoded:
    """What a body asks for."""
    check_declared_size(request.headers.get("content-length"))
    body = await request.body()
    return await by_size(len(body), decode, body, kind)


async def _respond(request: Request, call: Call) -> Response:
    """Run a call for as long as its client is there."""
    if not call.request.stream:
        return _json(await unless_gone(request, call.answer()))
    return await EventStream.of(request, call.events())


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
