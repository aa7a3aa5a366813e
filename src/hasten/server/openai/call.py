"""One request of OpenAI's API on its way: from its prompts to its answer, whole or as events."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from hasten.core.types import SamplingParams
from hasten.server.by_size import by_size
from hasten.server.engine.client import Progress
from hasten.server.openai.answer import AnswerForm, Usage, check_completions
from hasten.server.openai.choices import Choice, Choices
from hasten.server.openai.events import CallEvents
from hasten.server.openai.models import Found
from hasten.server.openai.reading import AnswerReading
from hasten.server.openai.requests import PromptRequests
from hasten.server.openai.types import GenerationRequest


@dataclass
class Call:
    """One request on its way: its prompts, and the form of its answer."""

    request: GenerationRequest
    model: Found
    prompts: Sequence[list[int]]
    params: SamplingParams
    choices: Choices
    form: AnswerForm
    queue_timeout: float | None = None
    """Seconds that its prompts may wait before they are begun; None: as long as the engine lets them."""
    prompts_only: bool = False
    """Whether prompts are to be given back and nothing is to follow them."""
    reading: AnswerReading | None = None
    """What the answer to a chat may have beside text."""

    def naming_errors(self) -> AbstractContextManager[None]:
        """Errors in it name what the client sent."""
        return nullcontext() if self.reading is None else self.reading.naming_errors()

    async def answer(self) -> bytes:
        """The whole answer."""
        usage, found, size = Usage(prompts_only=self.prompts_only), list[Choice](), 0
        requests = self.requests(usage, stream=False)
        try:
            await self.submit(requests)
            while requests.unfinished:
                with self.naming_errors():
                    number, progress = await requests.read()
                size += progress.size
                found += await by_size(progress.size, self._used_up, number, progress, usage)
                await asyncio.sleep(0)  # all that have ended would be looked at in one turn of the event loop
        finally:
            requests.close()
        return await by_size(size, self.form.whole, found, usage)

    def _used_up(self, number: int, progress: Progress, usage: Usage) -> Sequence[Choice]:
        """The choices of a progress, whose log-probabilities are freed one completion after the other."""
        choices = self.taken(number, progress, usage)
        for delta in progress.completions:
            delta.logprobs = None
        return choices

    def events(self) -> CallEvents:
        """The answer as events. What is wrong with the request shows before the first of them."""
        return CallEvents(self)

    def taken(self, number: int, progress: Progress, usage: Usage) -> Sequence[Choice]:
        """The choices, or pieces of choices, in a progress; HastenError where a completion ended with one."""
        check_completions(progress, self.params)
        choices = self.choices.take(number, progress)
        usage.reasoning_tokens = self.choices.reasoning_tokens
        return choices

    def requests(self, usage: Usage, *, stream: bool) -> PromptRequests:
        """Its requests of the engine, whose tokens are added to `usage`; `submit` queues them."""
        return PromptRequests(self.model.client, usage, stream=stream, tally=self.model.tally(len(self.prompts)))

    async def submit(self, requests: PromptRequests) -> None:
        """Queue its prompts."""
        body = self.request
        options: dict[str, Any] = {"queue_timeout": self.queue_timeout, "salt": body.cache_salt}
        await requests.submit(self.prompts, self.params, priority=body.priority or 0, **options)
