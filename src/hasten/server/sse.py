"""Answers that follow their client: what is computed for a client ends when the client is gone.

The body of a streamed answer is written by callbacks of the event loop: an ASGI message for each event would cost a
switch to a task and a way through every layer of the application: several times what the event itself costs.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

BODY = "body"
"""Where the writer is in the state of a request."""


class Flow(FlowControl):
    """Whether the client of one connection takes what is written to it, and is there at all."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.on_writable: Callable[[], None] | None = None
        """Called whenever the client has taken enough of what waited for it, and at the end of the connection."""
        self.is_gone = False
        self.on_gone: Callable[[], None] | None = None
        """Called when nobody waits for answers any more."""

    def leave(self) -> None:
        """The client has left, or shall get no more."""
        self.is_gone = True
        if self.on_gone is not None:
            self.on_gone()

    def resume_writing(self) -> None:
        """See FlowControl."""
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()


class BodyWriter:
    """Writes chunks of an answer straight to its connection, behind the head and before the end, which ASGI writes."""

    def __init__(self, cycle: RequestResponseCycle, flow: Flow) -> None:
        self._cycle = cycle
        self.flow = flow

    @classmethod
    def of(cls, scope: Scope) -> "BodyWriter":
        """That of a request."""
        writer: BodyWriter = scope["state"][BODY]
        return writer

    def begin(self) -> None:
        """To be called before the head: HTTP/1.0 has no chunks, the end of its connection ends such a body."""
        if self._cycle.scope["http_version"] == "1.0":
            self._cycle.chunked_encoding = False

    @property
    def writable(self) -> bool:
        """Whether the client has taken enough of what was written before."""
        return not self.flow.write_paused

    def listen(self, on_writable: Callable[[], None] | None) -> None:
        """Have a function called whenever `writable` has become true; None: no longer."""
        self.flow.on_writable = on_writable

    def write(self, data: bytes) -> None:
        """Write a chunk, whether writable or not; nothing once the client is gone."""
        if data and not self.flow.is_gone:
            chunk = b"%x\r\n%b\r\n" % (len(data), data) if self._cycle.chunked_encoding else data
            self._cycle.transport.write(chunk)

    async def drain(self) -> None:
        """Wait until it is writable, or the client is gone."""
        await self.flow.drain()


Result = TypeVar("Result")


async def unless_gone(scope: Scope, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work` for a request; ClientDisconnect, with the work cancelled, where its client leaves before."""
    # the connection says so: a task that reads what ASGI says of it would take 20 us of each request
    task, flow, left = asyncio.current_task(), BodyWriter.of(scope).flow, False
    assert task is not None, "requests are answered by tasks"

    def leave() -> None:
        nonlocal left
        left = True
        task.cancel()

    flow.on_gone = leave
    flow.resume_reading()  # a large body has paused it, and the connection's end would not be seen
    if flow.is_gone:
        leave()
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        flow.on_gone = None


class Events(Protocol):
    """What an answer has as server-sent events."""

    async def first(self) -> bytes:
        """The first events, with which the answer begins. Raises what is wrong with the request."""

    async def write(self, body: BodyWriter) -> None:
        """Write all others to a body, as they come."""

    async def close(self) -> None:
        """Withdraw the request if it has not ended."""


class EventStream(Response):
    """Server-sent events, sent as they come; they are closed when the client leaves. Made by `of`."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: Events) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    @classmethod
    async def of(cls, request: Request, events: Events) -> "EventStream":
        """The answer with these events, once there is one: an error before it has a status of its own."""
        try:
            return cls(await unless_gone(request.scope, events.first()), events)
        except BaseException:
            await events.close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            # A server that stops cancels what a client has not read when its time is over: that is no fault to report.
            with suppress(ClientDisconnect, asyncio.CancelledError):
                await unless_gone(scope, self._send(send, BodyWriter.of(scope)))
        finally:
            await self._events.close()

    async def _send(self, send: Send, body: BodyWriter) -> None:
        body.begin()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body.write(self._first)
        await self._events.write(body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
