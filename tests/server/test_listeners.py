"""Ports that are closed while requests are under way."""

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from tests.waiting import LIMIT_S

from hasten.server.listeners import HttpListener


def test_an_end_that_is_given_up_can_be_had_at_once(run: Any) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await never.wait()

    async def stop_twice() -> None:
        others = asyncio.all_tasks()  # the loop is that of other tests, too, and of what they left running
        listener = HttpListener("127.0.0.1", 0, "--http-port")
        await listener.start(app)
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        await begun.wait()
        patient = asyncio.ensure_future(listener.stop(3600))
        await asyncio.sleep(0.2)  # wherever it is by then
        assert not patient.done()
        patient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await patient
        await asyncio.wait_for(listener.stop(0), LIMIT_S)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", listener.port)
        never.set()
        writer.close()
        await asyncio.gather(*(asyncio.all_tasks() - others), return_exceptions=True)

    run(stop_twice())
