"""OpenAI's API: models, completions and chats over the server's engines, whole or as streams.

Beside it are vLLM's routes for tokenizers: texts and chats to token ids, and back, within the limits of prompts.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import InvalidRequestError
from hasten.core.types import SamplingParams
from hasten.engine.text import Tokenizer
from hasten.server.anthropic.routes import message_routes
from hasten.server.engine.client import EngineClient
from hasten.server.openai.answer import CompletionForm
from hasten.server.openai.call import Call, ChatCalls
from hasten.server.openai.choices import completion_choices
from hasten.server.openai.handling import api_route, checked_queueing, guarded, json_response
from hasten.server.openai.models import ModelFinder
from hasten.server.openai.params import OpenAIError, check_chat, completion_params
from hasten.server.openai.prompts import ChatPrompts, encoded, tokenized
from hasten.server.openai.types import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest, Tool
from hasten.server.openapi.operation import Operation
from hasten.server.pooling.routes import pooling_routes
from hasten.server.responses.routes import responses_route
from hasten.server.tokenizing import check_prompt_logprobs, tokenizing

if TYPE_CHECKING:
    from hasten.server.service import Service


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize: either a prompt or the messages of a chat."""

    model: str | None = None
    """The server's only one, where it is left out."""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """By default a prompt gets them, and a chat has those of its template."""
    return_token_strs: bool | None = None
    """Whether the answer has the vocabulary's own text of each token."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def _tokenizer(client: EngineClient) -> Tokenizer:
    if client.tokenizer is None:
        raise OpenAIError("the model has no tokenizer")
    return client.tokenizer


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def openai_routes(service: "Service", prompts: ChatPrompts, *, with_metrics: bool = False) -> list[Route]:
    """The routes of OpenAI's API, of Anthropic's messages, and vLLM's for tokenizers, vectors and scores of texts.

    `prompts` has the chat templates, which the page uses too. `with_metrics`: answers have the times of their requests.
    """
    models = ModelFinder(service)
    chats = ChatCalls(models, prompts)
    api = _Api(models, prompts, chats, with_metrics=with_metrics)
    return [
        Route("/v1/models", guarded(api.models, Operation("The models")), methods=["GET"]),
        Route("/v1/models/{model:path}", guarded(api.model, Operation("One model")), methods=["GET"]),
        api_route("/v1/completions", "Complete prompts", CompletionRequest, api.completions, streams=True),
        api_route("/v1/chat/completions", "Answer a chat", ChatRequest, api.chat, streams=True),
        api_route("/tokenize", "Texts as tokens", TokenizeRequest, api.tokenize),
        api_route("/detokenize", "Tokens as text", DetokenizeRequest, api.detokenize),
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
        return json_response({"object": "list", "data": entries})

    async def model(self, request: Request) -> Response:
        return json_response(self._entry(request.path_params["model"]))

    def _entry(self, name: str) -> dict[str, Any]:
        info = self._models.find(name).client.info
        entry = {"id": name, "object": "model", "created": self._created, "owned_by": "hasten"}
        entry |= {"max_model_len": info.max_model_len, "tasks": ["generate"]}
        if (pooling := info.pooling) is None:
            return entry
        return entry | {"tasks": pooling.tasks, "width": pooling.width, "labels": pooling.labels or None}

    async def tokenize(self, _: Request, body: TokenizeRequest) -> Response:
        client = self._models.find_any(body.model).client
        ids = await self._token_ids(body, client)
        with client.counting_refusals():
            texts = await tokenizing.run(partial(_tokenizer(client).tokens, ids)) if body.return_token_strs else None
        most = client.info.max_model_len
        return json_response({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": texts})

    async def _token_ids(self, body: TokenizeRequest, client: EngineClient) -> list[int]:
        special = body.add_special_tokens
        if (body.prompt is None) == (body.messages is None):
            raise OpenAIError("give either a prompt or messages", param="prompt")
        if body.prompt is not None:
            return (await encoded([body.prompt], client, "prompt", add_special_tokens=special is not False))[0]
        chat = ChatRequest(
            model="",
            messages=body.messages or [],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=body.tools,
        )
        check_chat(chat)
        return (await self._prompts.chat(chat, client, add_special_tokens=bool(special)))[0]

    async def detokenize(self, _: Request, body: DetokenizeRequest) -> Response:
        client = self._models.find_any(body.model).client
        try:
            with client.counting_refusals():
                text = await tokenizing.decode(_tokenizer(client), body.tokens, client.info.vocab_size)
        except InvalidRequestError as error:
            raise OpenAIError(str(error), param="tokens") from None
        return json_response({"prompt": text})

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        found = self._models.find_generator(body.model)
        client = found.client
        prompts = body.prompts()
        params = completion_params(body, len(prompts))
        choices = completion_choices(body, prompts, params, client.tokenizer)
        queueing = checked_queueing(request, client, body.priority, body.cache_salt)
        tokens = await tokenized(prompts, client, "prompt", add_special_tokens=True)
        check_prompt_logprobs(sum(map(len, tokens)), params.prompt_logprobs, client.info.vocab_size)
        form = self._form("text_completion", body, params)
        call = Call(body, found, tokens, params, choices, form, queueing, body.shows_prompts_only)
        return await call.respond(request)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        return await self._chats.answer(request, body, partial(self._form, "chat.completion", body))

    def _form(self, call: str, body: GenerationRequest, params: SamplingParams) -> CompletionForm:
        timed = params if self._with_metrics else None
        return CompletionForm(call, body.model, body.stream_options, params=timed)
