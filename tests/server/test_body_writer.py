"""Bodies that are written past ASGI, over a connection of the test's own."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from tests.server.test_connection_times import Transport
from tests.waiting import LIMIT_S
from uvicorn.server import ServerState

from hasten.server.connections import Connections
from hasten.server.options import EndpointOptions, SecurityOptions
from hasten.server.sse import BODY, BodyWriter, unless_gone

ASKS = b"GET / HTTP/1.1\r\n\r\n"


class Streaming:
    """A connection to an application that streams what the test writes."""

    def __init__(self) -> None:
        self.body: asyncio.Future[BodyWriter] = asyncio.get_running_loop().create_future()
        self.end = asyncio.Event()
        config = uvicorn.Config(self._app, interface="asgi3", lifespan="off", log_config=None)
        config.load()
        self.transport = Transport()
        connections = Connections(EndpointOptions(), SecurityOptions())
        self.connection = connections(config=config, server_state=ServerState(), app_state={})
        self.connection.connection_made(self.transport)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.body.set_result(BodyWriter.of(scope))
        await self.end.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ended(self) -> None:
        self.end.set()
        while not self.connection.cycle.response_complete:
            await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


def test_chunks_stand_between_the_head_and_the_end() -> None:
    async def check() -> None:
        site = Streaming()
        site.connection.data_received(ASKS)
        body = await site.body
        body.write(b"data: a\n\n")
        body.write(b"")  # would be the end
        body.write(b"b" * 17)
        await site.ended()
        head, _, chunks = site.transport.written.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert chunks == b"9\r\ndata: a\n\n\r\n" + b"11\r\n" + 17 * b"b" + b"\r\n" + b"0\r\n\r\n"
        site.connection.connection_lost(None)

    run(check())


def test_a_full_connection_says_when_there_is_room_again() -> None:
    async def check() -> None:
        site, calls = Streaming(), list[bool]()
        site.connection.data_received(ASKS + ASKS)  # the second one waits for the first
        body = await site.body
        body.listen(lambda: calls.append(body.writable))
        assert body.writable
        site.connection.pause_writing()
        assert not body.writable
        draining = asyncio.create_task(body.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        site.connection.resume_writing()
        await draining
        assert calls == [True]
        body.listen(None)
        site.connection.pause_writing()
        site.connection.resume_writing()
        assert calls == [True]
        site.connection.connection_lost(None)
        site.end.set()
        await asyncio.sleep(0)

    run(check())


def test_nothing_is_written_for_a_client_that_has_left() -> None:
    async def check() -> None:
        site, calls = Streaming(), list[bool]()
        site.connection.data_received(ASKS)
        body = await site.body
        body.listen(lambda: calls.append(body.writable))
        site.connection.pause_writing()
        site.connection.connection_lost(ConnectionResetError())
        assert calls == [True]  # whoever waits for room goes on, and finds it gone
        before = site.transport.written
        body.write(b"more")
        assert site.transport.written == before
        site.end.set()
        await asyncio.sleep(0)

    run(check())


@pytest.mark.parametrize("asks", [ASKS, ASKS + ASKS])
def test_work_ends_with_its_client_whatever_else_that_has_sent(asks: bytes) -> None:
    async def check() -> None:
        site, ended = Streaming(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        site.connection.data_received(asks)
        scope: Scope = {"state": {BODY: await site.body}}
        working = asyncio.create_task(unless_gone(scope, work()))
        await asyncio.sleep(0)
        site.connection.connection_lost(None)
        with pytest.raises(ClientDisconnect):
            await working
        assert ended.is_set()
        with pytest.raises(ClientDisconnect):  # nor is anything begun for it
            await unless_gone(scope, work())
        site.end.set()
        await asyncio.sleep(0)

    run(check())
