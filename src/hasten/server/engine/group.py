"""The requests that one call makes of an engine: one per prompt or text."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hasten.core.errors import HastenError
from hasten.server.engine.client import EngineClient
from hasten.server.engine.ticket import Progress, Ticket

if TYPE_CHECKING:
    from hasten.server.openai.answer import Usage
    from hasten.server.statistics import Tally

REQUESTS_PER_TURN = 32
"""That begin in one turn of the event loop, so that no number of them holds it up: each takes about 0.2 ms."""


class RequestGroup:
    """What comes of several requests, each with its number. To be closed.

    `usage` gets their tokens, and `tally` counts them as one request; None where they are part of a request that is
    counted already.
    """

    def __init__(self, client: EngineClient, usage: "Usage | None" = None, tally: "Tally | None" = None) -> None:
        self.unfinished = 0
        """Requests that have not ended."""
        self.listener: Callable[[], None] = self._wake
        """Called, in a callback of the event loop, when a request has something to take."""
        self._client = client
        self._usage = usage
        self._tally = tally
        self._tickets: list[Ticket] = []
        self.news: dict[int, None] = {}
        """Requests that have something to take, in the order in which it came."""
        self._reader: asyncio.Future[None] | None = None

    async def submit(self, requests: Sequence[Callable[..., Awaitable[Ticket]]]) -> None:
        """Queue requests, a few in each turn of the event loop.

        Each is a call of `EngineClient.submit` or `submit_text` but for its listener; errors are theirs.
        """
        self.unfinished = len(requests)
        try:
            for number, request in enumerate(requests):
                if number and number % REQUESTS_PER_TURN == 0:
                    await asyncio.sleep(0)
                self._tickets.append(await request(listener=partial(self._on_news, number)))
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
        """What came first of all that is new, if anything is. Raises the error that ended a request."""
        while self.news:
            number = next(iter(self.news))
            del self.news[number]
            try:
                progress = self._tickets[number].take()
            except HastenError as error:
                self._fail(error)
                raise
            if progress is not None:
                self.unfinished -= progress.finished
                if self._usage is not None:
                    self._usage.count(progress, self._tickets[number])
                if self._tally is not None:
                    self._tally.take(progress, last=self.unfinished == 0)
                return number, progress
        return None

    async def read(self) -> tuple[int, Progress]:
        """What came first of all that is new; waits for it. Raises the error that ended a request."""
        while (taken := self.take()) is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return taken

    def close(self) -> None:
        """Withdraw what has not ended, hear no more of it, and close the tally."""
        self.listener = self._wake
        for ticket in reversed(self._tickets):  # what waits is gone before there is a place for it
            ticket.listener = None
            self._client.withdraw(ticket)
        self._tickets.clear()
        self.news.clear()
        if self._tally is not None:
            self._tally.close()
