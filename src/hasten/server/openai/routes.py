"""OpenAI's API: models, completions and chats over the server's engines, whole or as streams."""

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.server.openai.call import Call
from hasten.server.openai.choices import ChatChoices, completion_choices
from hasten.server.openai.handlers import checked_wait, guarded, json_response, read_body
from hasten.server.openai.models import ModelFinder, Models
from hasten.server.openai.params import OpenAIError, chat_params, check_chat, completion_params
from hasten.server.openai.prompts import ChatPrompts, tokenized
from hasten.server.openai.tokens import DetokenizeRequest, TokenizeRequest, text_of, token_ids
from hasten.server.openai.types import ChatRequest, CompletionRequest
from hasten.server.pooling.routes import pooling_routes
from hasten.server.sse import EventStream, unless_gone
from hasten.server.tokenizing import check_prompt_logprobs

_encode = msgspec.json.Encoder().encode
_COMPLETION, _CHAT = msgspec.json.Decoder(CompletionRequest), msgspec.json.Decoder(ChatRequest)
_TOKENIZE, _DETOKENIZE = msgspec.json.Decoder(TokenizeRequest), msgspec.json.Decoder(DetokenizeRequest)


def openai_routes(service: Models) -> list[Route]:
    """The routes of OpenAI's API, and vLLM's for its tokenizers and for vectors and scores of texts."""
    models = ModelFinder(service)
    api = _Api(models)
    return [
        Route("/v1/models", guarded(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", guarded(api.model), methods=["GET"]),
        Route("/v1/completions", guarded(api.completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(api.chat), methods=["POST"]),
        Route("/tokenize", guarded(api.tokenize), methods=["POST"]),
        Route("/detokenize", guarded(api.detokenize), methods=["POST"]),
        *pooling_routes(models),
        Route("/v1/{path:path}", guarded(_unknown), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


async def _unknown(request: Request) -> Response:
    where = f"{request.method} {request.url.path}"
    if request.url.path == "/v1/responses":
        message = f"{where} is not supported; there are completions and chat/completions"
        raise OpenAIError(message, status=404, code="unknown_url")
    raise OpenAIError(f"unknown request URL: {where}", status=404, code="unknown_url")


class _Api:
    def __init__(self, models: ModelFinder) -> None:
        self._models = models
        self._created = int(time.time())
        self._prompts = ChatPrompts()

    async def models(self, request: Request) -> Response:
        entries = [self._entry(name) for name in self._models.names()]
        return json_response(_encode({"object": "list", "data": entries}))

    async def model(self, request: Request) -> Response:
        return json_response(_encode(self._entry(request.path_params["model"])))

    def _entry(self, name: str) -> dict[str, Any]:
        info = self._models.find(name).client.info
        made = {"id": name, "object": "model", "created": self._created, "owned_by": "hasten"}
        made |= {"max_model_len": info.max_model_len, "tasks": ["generate"]}
        if (pooling := info.pooling) is None:
            return made
        return made | {"tasks": pooling.tasks, "width": pooling.width, "labels": pooling.labels or None}

    async def tokenize(self, request: Request) -> Response:
        asked = await read_body(request, _TOKENIZE)
        return json_response(await token_ids(asked, self._models.find_any(asked.model).client, self._prompts))

    async def detokenize(self, request: Request) -> Response:
        asked = await read_body(request, _DETOKENIZE)
        return json_response(await text_of(asked, self._models.find_any(asked.model).client))

    async def completions(self, request: Request) -> Response:
        asked = await read_body(request, _COMPLETION)
        found = self._models.find_generator(asked.model)
        client = found.client
        prompts = asked.prompts()
        params = completion_params(asked, len(prompts))
        choices = completion_choices(asked, prompts, params, client.tokenizer)
        timeout = checked_wait(request, asked.priority, client)
        tokens = await tokenized(prompts, client, "prompt", add_special_tokens=True)
        check_prompt_logprobs(sum(map(len, tokens)), params.prompt_logprobs, client.info.vocab_size)
        call = Call(asked, found, tokens, params, choices, "text_completion", timeout, asked.shows_prompts_only)
        return await _respond(request, call)

    async def chat(self, request: Request) -> Response:
        asked = await read_body(request, _CHAT)
        found = self._models.find_generator(asked.model)
        client = found.client
        check_chat(asked)
        timeout = checked_wait(request, asked.priority, client)
        tools = await self._prompts.tools(asked, client)
        tokens = await self._prompts.chat(asked, client, tools)
        params = chat_params(asked, client.info.max_model_len - len(tokens), tools)
        choices = ChatChoices(bool(asked.stream), asked.top_logprobs or 0, tools)
        call = Call(asked, found, [tokens], params, choices, "chat.completion", timeout, tools=tools)
        return await _respond(request, call)


async def _respond(request: Request, call: Call) -> Response:
    """Run a call for as long as its client is there."""
    if not call.request.stream:
        return json_response(await unless_gone(request, call.answer()))
    return await EventStream.of(request, call.events())
