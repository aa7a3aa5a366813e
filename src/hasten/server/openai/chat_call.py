"""A chat on its way to the engine, whichever API its request came by."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from hasten.core.types import SamplingParams
from hasten.server.openai.answer import AnswerForm
from hasten.server.openai.call import Call
from hasten.server.openai.choices import ChatChoices
from hasten.server.openai.handlers import checked_wait, json_response
from hasten.server.openai.models import ModelFinder
from hasten.server.openai.params import chat_params, check_chat
from hasten.server.openai.prompts import ChatPrompts
from hasten.server.openai.reading import AnswerReading
from hasten.server.openai.types import ChatRequest
from hasten.server.sse import EventStream, unless_gone

Form = Callable[[SamplingParams], AnswerForm]
"""How the answer to a request with these parameters is written."""
Check = Callable[[AnswerReading | None], None]
"""Raises OpenAIError where an API cannot write what the answer may have."""


class ChatCalls:
    """Makes calls of chats."""

    def __init__(self, models: ModelFinder, prompts: ChatPrompts) -> None:
        self._models = models
        self._prompts = prompts

    async def answer(self, request: Request, body: ChatRequest, form: Form, check: Check = lambda _: None) -> Response:
        """The answer to a chat, whole or as events."""
        found = self._models.find_generator(body.model)
        client = found.client
        check_chat(body)
        timeout = checked_wait(request, body.priority, client)
        tokens, reading = await self._prompts.chat(body, client)
        check(reading)
        params = chat_params(body, client.info.max_model_len - len(tokens), reading)
        choices = ChatChoices(bool(body.stream), body.top_logprobs or 0, reading, params.skip_special_tokens)
        call = Call(body, found, [tokens], params, choices, form(params), timeout, reading=reading)
        return await respond(request, call)

    async def prompt_tokens(self, body: ChatRequest) -> int:
        """How many tokens the prompt of a chat has."""
        client = self._models.find_generator(body.model).client
        check_chat(body)
        return len((await self._prompts.chat(body, client))[0])


async def respond(request: Request, call: Call) -> Response:
    """Run a call for as long as its client is there."""
    if not call.request.stream:
        return json_response(await unless_gone(request, call.answer()))
    return await EventStream.of(request, call.events())
