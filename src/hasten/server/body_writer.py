"""The body of a streamed answer, written by callbacks of the event loop.

An ASGI message for each event would cost a switch to a task and a way through every layer of the application: several
times what the event itself costs.
"""

import asyncio
from collections.abc import Callable

from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

BODY = "body"
"""Where the writer is in the state of a request."""


class Flow(FlowControl):
    """Whether the client of one connection takes what is written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.on_writable: Callable[[], None] | None = None
        """Called whenever the client has taken enough of what waited for it, and at the end of the connection."""

    def resume_writing(self) -> None:
        """See FlowControl."""
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()


class BodyWriter:
    """Writes chunks of an answer straight to its connection, behind the head and before the end, which ASGI writes."""

    def __init__(self, cycle: RequestResponseCycle, flow: Flow) -> None:
        self._cycle = cycle
        self._flow = flow

    @classmethod
    def of(cls, scope: Scope) -> "BodyWriter":
        """That of a request."""
        writer: BodyWriter = scope["state"][BODY]
        return writer

    @property
    def writable(self) -> bool:
        """Whether the client has taken enough of what was written before."""
        return not self._flow.write_paused

    def listen(self, on_writable: Callable[[], None] | None) -> None:
        """Have a function called whenever `writable` has become true; None: no longer."""
        self._flow.on_writable = on_writable

    def write(self, data: bytes) -> None:
        """Write a chunk, whether writable or not; nothing once the client is gone."""
        if data and not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def drain(self) -> None:
        """Wait until it is writable, or the client is gone."""
        await self._flow.drain()
