"""The requests that one call of OpenAI's API makes of an engine: one per prompt."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from hasten.core.errors import HastenError
from hasten.core.types import Request, SamplingParams
from hasten.server.engine.client import EngineClient, Progress
from hasten.server.engine.ticket import Ticket
from hasten.server.openai.answer import Usage
from hasten.server.together import TASKS_PER_TURN

if TYPE_CHECKING:
    from hasten.server.version import Tally

Prompt = TypeVar("Prompt")


class PromptRequests:
    """What comes of several prompts, each with its number. `close` withdraws what has not ended, and closes the tally.

    `tally` counts them as one request; None where they are part of a request that is counted already.
    """

    def __init__(self, client: EngineClient, usage: Usage, *, stream: bool, tally: "Tally | None" = None) -> None:
        self.unfinished = 0
        """Prompts that have not ended."""
        self.listener: Callable[[], None] = self._wake
        """Called, in a callback of the event loop, when a prompt has something to take."""
        self._client = client
        self._usage = usage
        self._stream = stream
        self._tally = tally
        self._tickets: list[Ticket] = []
        self.news: dict[int, None] = {}
        """Prompts that have something to take, in the order in which it came."""
        self._reader: asyncio.Future[None] | None = None

    async def submit(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        priority: int,
        queue_timeout: float | None,
        salt: str | None = None,
    ) -> None:
        """Queue all prompts, a few in each turn of the event loop. Errors are those of `EngineClient.submit`."""

        def put(prompt: list[int], listener: Callable[[], None]) -> Awaitable[Ticket]:
            options: dict[str, Any] = {"priority": priority, "queue_timeout": queue_timeout, "salt": salt}
            return self._client.submit(prompt, params, stream=self._stream, listener=listener, **options)

        await self._submit(prompts, put)

    async def submit_texts(self, requests: Sequence[Request], *, priority: int, queue_timeout: float | None) -> None:
        """Queue texts of which vectors or scores are to be made; as `submit`."""

        def put(request: Request, listener: Callable[[], None]) -> Awaitable[Ticket]:
            return self._client.submit_text(request, priority=priority, queue_timeout=queue_timeout, listener=listener)

        await self._submit(requests, put)

    async def _submit(
        self, prompts: Sequence[Prompt], put: Callable[[Prompt, Callable[[], None]], Awaitable[Ticket]]
    ) -> None:
        self.unfinished = len(prompts)
        try:
            for number, prompt in enumerate(prompts):
                if number and number % TASKS_PER_TURN == 0:
                    await asyncio.sleep(0)
                self._tickets.append(await put(prompt, partial(self._on_news, number)))
        except HastenError as error:
            self._fail(error)
            raise

    def _fail(self, error: HastenError) -> None:
        if self._tally is not None:
            self._tally.fail(error)

    def _on_news(self, number: int) -> None:
        self.news[number] = None
        self.listener()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def take(self) -> tuple[int, Progress] | None:
        """What came first of all that is new, if anything is. Raises the error that ended a prompt."""
        while self.news:
            number = next(iter(self.news))
            del self.news[number]
            try:
                progress = self._tickets[number].take()
            except HastenError as error:
                self._fail(error)
                raise
            if progress is not None:
                self._usage.count(progress)
                if progress.finished:
                    self.unfinished -= 1
                    self._usage.finish(self._tickets[number])
                if self._tally is not None:
                    self._count(self._tally, progress)
                return number, progress
        return None

    def _count(self, tally: "Tally", progress: Progress) -> None:
        tally.take(progress, stream=self._stream)
        if self.unfinished == 0:
            tally.succeed()

    async def read(self) -> tuple[int, Progress]:
        """What came first of all that is new; waits for it. Raises the error that ended a prompt."""
        while (taken := self.take()) is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return taken

    def close(self) -> None:
        """Withdraw what has not ended, and hear no more of it."""
        self.listener = self._wake
        for ticket in reversed(self._tickets):  # what waits is gone before there is a place for it
            ticket.listener = None
            self._client.withdraw(ticket)
        self._tickets.clear()
        self.news.clear()
        if self._tally is not None:
            self._tally.close()
