"""OpenAI's API: models, completions and chats over the server's engines, whole or as streams."""

import time
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.types import SamplingParams
from hasten.server.anthropic.routes import message_routes
from hasten.server.openai.answer import CompletionForm
from hasten.server.openai.call import Call
from hasten.server.openai.chat_call import ChatCalls, respond
from hasten.server.openai.choices import completion_choices
from hasten.server.openai.handlers import checked_wait, guarded, json_response, read_body
from hasten.server.openai.models import ModelFinder, Models
from hasten.server.openai.params import OpenAIError, completion_params
from hasten.server.openai.prompts import ChatPrompts, tokenized
from hasten.server.openai.tokens import DetokenizeRequest, TokenizeRequest, text_of, token_ids
from hasten.server.openai.types import ChatRequest, CompletionRequest, GenerationRequest
from hasten.server.openapi.operation import Operation
from hasten.server.pooling.routes import pooling_routes
from hasten.server.responses.routes import responses_route
from hasten.server.tokenizing import check_prompt_logprobs

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_encode = msgspec.json.Encoder().encode
_COMPLETION, _CHAT = msgspec.json.Decoder(CompletionRequest), msgspec.json.Decoder(ChatRequest)
_TOKENIZE, _DETOKENIZE = msgspec.json.Decoder(TokenizeRequest), msgspec.json.Decoder(DetokenizeRequest)


def openai_routes(service: Models, prompts: ChatPrompts, *, with_metrics: bool = False) -> list[Route]:
    """The routes of OpenAI's API, of Anthropic's messages, and vLLM's for tokenizers, vectors and scores of texts.

    `prompts` has the chat templates, which the page uses too. `with_metrics`: answers have the times of their requests.
    """
    models = ModelFinder(service)
    chats = ChatCalls(models, prompts)
    completions = Operation("Complete prompts", CompletionRequest, streams=True)
    chat = Operation("Answer a chat", ChatRequest, streams=True)
    api = _Api(models, prompts, chats, with_metrics=with_metrics)
    return [
        Route("/v1/models", guarded(api.models, Operation("The models")), methods=["GET"]),
        Route("/v1/models/{model:path}", guarded(api.model, Operation("One model")), methods=["GET"]),
        Route("/v1/completions", guarded(api.completions, completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(api.chat, chat), methods=["POST"]),
        Route("/tokenize", guarded(api.tokenize, Operation("Texts as tokens", TokenizeRequest)), methods=["POST"]),
        Route("/detokenize", guarded(api.detokenize, Operation("Tokens as text", DetokenizeRequest)), methods=["POST"]),
        responses_route(chats, with_metrics=with_metrics),
        *message_routes(chats),
        *pooling_routes(models),
        Route("/v1/{path:path}", guarded(_unknown, Operation("None")), methods=_METHODS, include_in_schema=False),
    ]


async def _unknown(request: Request) -> Response:
    raise OpenAIError(f"unknown request URL: {request.method} {request.url.path}", status=404, code="unknown_url")


class _Api:
    def __init__(self, models: ModelFinder, prompts: ChatPrompts, chats: ChatCalls, *, with_metrics: bool) -> None:
        self._models = models
        self._created = int(time.time())
        self._prompts = prompts
        self._chats = chats
        self._with_metrics = with_metrics

    async def models(self, request: Request) -> Response:
        entries = [self._entry(name) for name in self._models.names()]
        return json_response(_encode({"object": "list", "data": entries}))

    async def model(self, request: Request) -> Response:
        return json_response(_encode(self._entry(request.path_params["model"])))

    def _entry(self, name: str) -> dict[str, Any]:
        info = self._models.find(name).client.info
        entry = {"id": name, "object": "model", "created": self._created, "owned_by": "hasten"}
        entry |= {"max_model_len": info.max_model_len, "tasks": ["generate"]}
        if (pooling := info.pooling) is None:
            return entry
        return entry | {"tasks": pooling.tasks, "width": pooling.width, "labels": pooling.labels or None}

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, _TOKENIZE)
        return json_response(await token_ids(body, self._models.find_any(body.model).client, self._prompts))

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, _DETOKENIZE)
        return json_response(await text_of(body, self._models.find_any(body.model).client))

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, _COMPLETION)
        found = self._models.find_generator(body.model)
        client = found.client
        prompts = body.prompts()
        params = completion_params(body, len(prompts))
        choices = completion_choices(body, prompts, params, client.tokenizer)
        timeout = checked_wait(request, body.priority, client)
        tokens = await tokenized(prompts, client, "prompt", add_special_tokens=True)
        check_prompt_logprobs(sum(map(len, tokens)), params.prompt_logprobs, client.info.vocab_size)
        form = self._form("text_completion", body, params)
        call = Call(body, found, tokens, params, choices, form, timeout, body.shows_prompts_only)
        return await respond(request, call)

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, _CHAT)
        return await self._chats.answer(request, body, partial(self._form, "chat.completion", body))

    def _form(self, call: str, body: GenerationRequest, params: SamplingParams) -> CompletionForm:
        timed = params if self._with_metrics else None
        return CompletionForm(call, body.model, body.stream_options, params=timed)
