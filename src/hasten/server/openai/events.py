"""The answer to a call of OpenAI's API as server-sent events.

Events are written by the callback that the engine's step comes with, so an event costs no switch to a task. What comes
while the client is behind, or while a large event is made beside the event loop, is joined by the prompts' tickets.
"""

import asyncio
from typing import TYPE_CHECKING

from hasten.core.errors import HastenError
from hasten.server.body_writer import BodyWriter
from hasten.server.by_size import SMALL, by_size
from hasten.server.engine.client import Progress
from hasten.server.openai.answer import Usage

if TYPE_CHECKING:
    from hasten.server.openai.call import Call


class CallEvents:
    """See Events."""

    def __init__(self, call: "Call") -> None:
        self._call = call
        self._usage = Usage(prompts_only=call.prompts_only)
        self._requests = call.requests(self._usage, stream=True)
        self._body: BodyWriter
        self._ended: asyncio.Future[None]
        """Comes with the last event."""
        self._paused = False
        """Whether nothing may be written now, although the client is not behind."""
        self._room = SMALL
        """Bytes to look at before others have a turn of the event loop."""
        self._large: asyncio.Task[None] | None = None

    async def first(self) -> bytes:
        """See Events."""
        await self._call.submit(self._requests)
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
        if self._requests.unfinished == 0:
            return
        self._body, self._ended = body, asyncio.get_running_loop().create_future()
        self._requests.listener = self._flush
        body.listen(self._flush)
        try:
            self._flush()
            await self._ended
        finally:
            body.listen(None)

    def _flush(self) -> None:
        """Write what there is. Errors end the answer: whoever calls this has nothing to do with it."""
        try:
            while self._requests.news and not self._paused and self._body.writable:
                if (taken := self._requests.take()) is not None:
                    self._write(*taken)
        except Exception as error:
            self._fail(error)

    def _write(self, number: int, progress: Progress) -> None:
        size = progress.size
        if size > SMALL:
            self._paused = True
            self._large = asyncio.create_task(self._write_large(number, progress))
            return
        self._put(self._events(number, progress))
        self._room -= size
        if self._room < 0:
            self._paused = True
            asyncio.get_running_loop().call_soon(self._resume)

    async def _write_large(self, number: int, progress: Progress) -> None:
        try:
            events = await by_size(progress.size, self._events, number, progress)
        except Exception as error:
            self._fail(error)
            return
        self._put(events)
        self._resume()

    def _put(self, events: bytes) -> None:
        self._body.write(events)
        if self._requests.unfinished == 0 and not self._ended.done():
            self._ended.set_result(None)

    def _resume(self) -> None:
        self._paused, self._room = False, SMALL
        self._flush()

    def _fail(self, error: Exception) -> None:
        """End the answer: with an event where the error is foreseen, else by raising it from `write`."""
        if self._ended.done():
            return
        self._paused = True
        if isinstance(error, HastenError):
            self._body.write(self._call.form.error(error))
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    async def close(self) -> None:
        """See Events."""
        self._paused = True
        self._requests.close()
        if self._large is not None:
            self._large.cancel()
            await asyncio.gather(self._large, return_exceptions=True)
