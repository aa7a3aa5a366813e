"""One request of OpenAI's API on its way: from its prompts to its answer, whole or as events.

Events are written by the callback that the engine's step comes with, so an event costs no switch to a task. What comes
while the client is behind, or while a large event is made beside the event loop, is joined by the prompts' tickets.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from hasten.core.errors import HastenError
from hasten.core.types import SamplingParams
from hasten.server.by_size import SMALL, by_size
from hasten.server.engine.group import RequestGroup
from hasten.server.engine.queue import DEFAULT_QUEUEING, Queueing
from hasten.server.engine.ticket import Progress
from hasten.server.openai.answer import AnswerForm, Usage, check_completions
from hasten.server.openai.choices import ChatChoices, Choice, Choices
from hasten.server.openai.handling import checked_queueing, json_response
from hasten.server.openai.models import Found, ModelFinder
from hasten.server.openai.params import chat_params, check_chat
from hasten.server.openai.prompts import ChatPrompts
from hasten.server.openai.reading import AnswerReading
from hasten.server.openai.types import ChatRequest, GenerationRequest
from hasten.server.sse import BodyWriter, EventStream, unless_gone


class CallEvents:
    """See Events."""

    def __init__(self, call: "Call") -> None:
        self._call = call
        self._usage = Usage(prompts_only=call.prompts_only)
        self._requests = call.requests(self._usage, stream=True)
        self._body: BodyWriter
        self._pause: asyncio.Future[tuple[int, Progress] | None]
        """Comes when callbacks may write no more: with a large progress, after many bytes, or at the end."""
        self._room = SMALL
        """Bytes to look at before others have a turn of the event loop."""

    async def first(self) -> bytes:
        """See Events."""
        await self._call.submit(self._requests, stream=True)
        while True:
            with self._call.naming_errors():
                number, progress = await self._requests.read()
            if events := await by_size(progress.size, self._events, number, progress):
                return events

    def _events(self, number: int, progress: Progress) -> bytes:
        """What is new of a prompt; the last ones go with the end of the answer."""
        events = self._call.form.events(self._call.taken(number, progress, self._usage), self._usage)
        return events if self._requests.unfinished else events + self._call.form.end(self._usage)

    async def write(self, body: BodyWriter) -> None:
        """See Events."""
        self._body = body
        self._requests.listener = self._flush
        body.listen(self._flush)
        try:
            while self._requests.unfinished:
                self._pause, self._room = asyncio.get_running_loop().create_future(), SMALL
                self._flush()
                if (large := await self._pause) is not None:
                    body.write(await by_size(large[1].size, self._events, *large))
        except HastenError as error:
            body.write(self._call.form.error(error))
        finally:
            body.listen(None)

    def _flush(self) -> None:
        """Write what there is. Errors are those of `write`: whoever calls this has nothing to do with them."""
        try:
            while self._requests.news and not self._pause.done() and self._body.writable:
                if (taken := self._requests.take()) is not None:
                    self._write(taken)
        except Exception as error:
            self._pause.set_exception(error)

    def _write(self, taken: tuple[int, Progress]) -> None:
        size = taken[1].size
        if size > SMALL:
            self._pause.set_result(taken)
            return
        self._body.write(self._events(*taken))
        self._room -= size
        if self._room < 0 or not self._requests.unfinished:
            self._pause.set_result(None)

    async def close(self) -> None:
        """See Events."""
        self._requests.close()


@dataclass
class Call:
    """One request on its way: its prompts, and the form of its answer."""

    request: GenerationRequest
    model: Found
    prompts: Sequence[list[int]]
    params: SamplingParams
    choices: Choices
    form: AnswerForm
    queueing: Queueing = DEFAULT_QUEUEING
    prompts_only: bool = False
    """Whether prompts are to be given back and nothing is to follow them."""
    reading: AnswerReading | None = None
    """What the answer to a chat may have beside text."""

    def naming_errors(self) -> AbstractContextManager[None]:
        """Errors in it name what the client sent."""
        return nullcontext() if self.reading is None else self.reading.naming_errors()

    async def respond(self, request: Request) -> Response:
        """Run the call for as long as its client is there."""
        if not self.request.stream:
            return json_response(await unless_gone(request.scope, self.answer()))
        return await EventStream.of(request, CallEvents(self))

    async def answer(self) -> bytes:
        """The whole answer."""
        usage, found, size = Usage(prompts_only=self.prompts_only), list[Choice](), 0
        with closing(self.requests(usage, stream=False)) as requests:
            await self.submit(requests, stream=False)
            while requests.unfinished:
                with self.naming_errors():
                    number, progress = await requests.read()
                size += progress.size
                found += await by_size(progress.size, self._used_up, number, progress, usage)
                if requests.unfinished:  # all that have ended would be looked at in one turn of the event loop
                    await asyncio.sleep(0)
        return await by_size(size, self.form.whole, found, usage)

    def _used_up(self, number: int, progress: Progress, usage: Usage) -> Sequence[Choice]:
        """The choices of a progress, whose log-probabilities are freed one completion after the other."""
        choices = self.taken(number, progress, usage)
        for delta in progress.completions:
            delta.logprobs = None
        return choices

    def taken(self, number: int, progress: Progress, usage: Usage) -> Sequence[Choice]:
        """The choices, or pieces of choices, in a progress; HastenError where a completion ended with one."""
        check_completions(progress, self.params)
        choices = self.choices.take(number, progress)
        usage.reasoning_tokens = self.choices.reasoning_tokens
        return choices

    def requests(self, usage: Usage, *, stream: bool) -> RequestGroup:
        """Its requests of the engine, whose tokens are added to `usage`; `submit` queues them."""
        return RequestGroup(self.model.client, usage, self.model.tally(len(self.prompts), stream=stream))

    async def submit(self, requests: RequestGroup, *, stream: bool) -> None:
        """Queue its prompts."""
        submit = partial(self.model.client.submit, params=self.params, queueing=self.queueing, stream=stream)
        await requests.submit([partial(submit, prompt) for prompt in self.prompts])


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
        queueing = checked_queueing(request, client, body.priority, body.cache_salt)
        tokens, reading = await self._prompts.chat(body, client)
        check(reading)
        params = chat_params(body, client.info.max_model_len - len(tokens), reading)
        choices = ChatChoices(body.top_logprobs or 0, reading, params.skip_special_tokens)
        return await Call(body, found, [tokens], params, choices, form(params), queueing, reading=reading).respond(
            request
        )

    async def prompt_tokens(self, body: ChatRequest) -> int:
        """How many tokens the prompt of a chat has."""
        client = self._models.find_generator(body.model).client
        check_chat(body)
        return len((await self._prompts.chat(body, client))[0])
