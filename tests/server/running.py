"""Servers with all their ports in this process: each in a thread with an event loop of its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tests.server.loop_thread import LoopThread

from hasten.server import app
from hasten.server.app import Server
from hasten.server.options import ServeOptions
from hasten.server.protocol.http import http_app
from hasten.server.protocol.settings import LogSettings


async def created(options: ServeOptions) -> Server:
    """A server that has not been started; an event loop must run where it is created."""
    return Server(options, LogSettings())


@contextlib.contextmanager
def running(options: ServeOptions) -> Iterator[Server]:
    """A server from its start to its stop."""
    thread = LoopThread()
    try:
        server = thread.run(created(options))
        thread.run(server.start())
        try:
            yield server
        finally:
            thread.run(server.stop(0))
    finally:
        thread.close()


@contextlib.contextmanager
def running_with_routes(options: ServeOptions) -> Iterator[tuple[Server, dict[int, Sequence[Any]]]]:
    """`running`, and the routes of each HTTP port: the API's, and the metrics' where they have one."""
    routes: list[Sequence[Any]] = []

    def recorded(given: Sequence[Any], *arguments: Any) -> Any:
        routes.append(given)
        return http_app(given, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "http_app", recorded)
        with running(options) as server:
            listeners = (server.http, server.metrics)
            ports = [listener.port for listener in listeners if listener is not None]
            yield server, dict(zip(ports, routes, strict=True))
