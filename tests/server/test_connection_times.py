"""Time-outs of HTTP connections by a clock of the test's own: who is in time, however slow, is never ended."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from hasten.server import connections
from hasten.server.connections import Connections
from hasten.server.options import EndpointOptions, SecurityOptions

ENDS = EndpointOptions(
    http_idle_timeout_secs=75, http_header_timeout_secs=30, http_body_timeout_secs=60, http_write_timeout_secs=300
)
HEAD = b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = b""
        self.closing = False
        self.unread = 0

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


class Bench:
    """One connection to an application that answers when it is let go."""

    def __init__(self) -> None:
        self.now = 0.0
        self.go = asyncio.Event()
        self.all = Connections(ENDS, SecurityOptions(), clock=lambda: self.now)
        config = uvicorn.Config(self._app, interface="asgi3", lifespan="off", log_config=None, timeout_keep_alive=3600)
        config.load()
        self.transport = Transport()
        self.connection = self.all(config=config, server_state=ServerState(), app_state={})
        self.connection.connection_made(self.transport)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def after(self, seconds: float) -> "Bench":
        """What there is so much later."""
        self.now += seconds
        self.all.check()
        return self

    @property
    def quiet(self) -> bool:
        return not self.transport.closing and not self.transport.written

    async def answered(self) -> None:
        self.go.set()
        while b"200" not in self.transport.written:
            await asyncio.sleep(0)
        self.transport.written = b""
        await asyncio.sleep(0)


def run(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        bench = Bench()
        try:
            await test(bench)
        finally:
            bench.connection.connection_lost(None)
            bench.go.set()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(whole())


def test_a_head_has_its_time_from_its_first_byte_on() -> None:
    async def check(bench: Bench) -> None:
        bench.after(70)
        for byte in HEAD[:20]:
            bench.connection.data_received(bytes([byte]))
            assert bench.after(1).quiet
        assert bench.after(9).quiet
        assert bench.after(2).transport.written.startswith(b"HTTP/1.1 408 ")

    run(check)


def test_a_body_has_its_time_between_two_pieces() -> None:
    async def check(bench: Bench) -> None:
        bench.connection.data_received(HEAD)
        for _ in range(9):
            assert bench.after(59).quiet
            bench.connection.data_received(b"x")
        assert bench.after(59).quiet
        assert bench.after(2).transport.written.startswith(b"HTTP/1.1 408 ")

    run(check)


def test_an_answer_may_take_any_time_and_a_connection_has_its_own_between_requests() -> None:
    async def check(bench: Bench) -> None:
        for _ in range(3):
            bench.go.clear()
            bench.connection.data_received(HEAD + b"x" * 10)
            await asyncio.sleep(0)
            assert bench.after(10_000).quiet
            await bench.answered()
            assert bench.after(74).quiet
        assert bench.after(2).transport.closing

    run(check)


def test_a_reader_may_be_slow_but_must_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(bench: Bench) -> None:
        bench.connection.data_received(HEAD + b"x" * 10)
        bench.transport.unread = 1000
        for held in range(10, 0, -1):  # in the kernel's buffer
            monkeypatch.setattr(connections, "_unsent", lambda _, held=held: held)
            assert bench.after(299).quiet
        assert not bench.after(2).transport.closing
        assert bench.after(299).transport.closing

    run(check)
