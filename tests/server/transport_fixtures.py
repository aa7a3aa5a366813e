"""Transports over a service in memory, served from a thread of their own, so that blocking clients can ask them."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, cast

import httpx
import pytest
from tests.server.adding_service import AddingService
from tests.server.loop_thread import LoopThread

from hasten.server.inflight import InflightBytes
from hasten.server.listeners import GrpcListener, HttpListener
from hasten.server.options import EndpointOptions, SecurityOptions
from hasten.server.protocol.grpc import GrpcCalls
from hasten.server.protocol.http import http_app, http_routes
from hasten.server.protocol.operations import Operations
from hasten.server.protocol.settings import LogSettings, TraceSettings
from hasten.server.protocol.shared_memory import SharedMemory
from hasten.server.security import Admission, ApiKeys, Tls

LIMIT = 1 << 20
"""Most bytes of a request."""


def refusal(answer: httpx.Response, status: int = 400) -> str:
    """The text of an answer over HTTP that refuses."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return str(answer.json()["error"])


def workers(monkeypatch: pytest.MonkeyPatch, owner: ModuleType | type, name: str) -> list[str]:
    """From now on the names of the threads in which a function of a module or class is called."""
    found: list[str] = []
    work = getattr(owner, name)

    def recorded(*arguments: Any, **options: Any) -> Any:
        found.append(threading.current_thread().name)
        return work(*arguments, **options)

    monkeypatch.setattr(owner, name, recorded)
    return found


@dataclass
class Transports:
    """Both transports with what they share."""

    keys: ApiKeys | None = None
    tls: Tls | None = None
    service: AddingService = field(default_factory=AddingService)
    memory: SharedMemory = field(default_factory=partial(SharedMemory, allowed=True))
    traces: TraceSettings = field(default_factory=TraceSettings)
    logs: LogSettings = field(default_factory=LogSettings)
    ends: EndpointOptions = field(default_factory=EndpointOptions)
    security: SecurityOptions = field(default_factory=SecurityOptions)
    inflight: InflightBytes = field(default_factory=InflightBytes)

    async def start(self) -> None:
        service = cast(Any, self.service)
        self.http_listener = HttpListener("127.0.0.1", 0, "--http-port", self.tls, self.ends, self.security)
        operations = Operations(service, self.memory, self.traces, self.logs)
        routes = http_routes(operations, LIMIT)
        await self.http_listener.start(http_app(routes, Admission(keys=self.keys), LIMIT, self.inflight))
        calls = GrpcCalls(operations, self.inflight)
        limits = [("grpc.max_receive_message_length", LIMIT)]
        self.grpc_listener = GrpcListener(
            "127.0.0.1", 0, "--grpc-port", calls, keys=self.keys, tls=self.tls, options=limits
        )
        await self.grpc_listener.start()

    async def stop(self) -> None:
        await asyncio.gather(self.http_listener.stop(1), self.grpc_listener.stop(0.5))

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_listener.port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_listener.port}"


@contextlib.contextmanager
def serving(transports: Transports) -> Iterator[Transports]:
    """Start them, and stop them at the end."""
    thread = LoopThread()
    try:
        thread.run(transports.start())
        try:
            yield transports
        finally:
            thread.run(transports.stop())
    finally:
        thread.close()
