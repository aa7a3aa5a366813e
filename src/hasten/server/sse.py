"""Answers that follow their client: what is computed for a client ends when the client is gone."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; ClientDisconnect, with the work cancelled, where the client leaves before.

    The request's body must have been read: what comes next is the end of the connection.
    """
    return await _while_there(request.receive, work)


async def _while_there(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events, b"")


class EventStream(Response):
    """Server-sent events, sent as they come; the generator is closed when the client leaves. Made by `of`."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, others: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = others

    @classmethod
    async def of(cls, request: Request, events: AsyncGenerator[bytes, None]) -> "EventStream":
        """The answer with these events, once there is one: an error before it has a status of its own."""
        return cls(await unless_gone(request, _first(events)), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            # A server that stops cancels what a client has not read when its time is over: that is no fault to report.
            with suppress(ClientDisconnect, asyncio.CancelledError):
                await _while_there(receive, self._send(send))
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for events in self._events:
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
