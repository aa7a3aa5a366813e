"""What listens: an HTTP server for an ASGI application, and a gRPC server. Both open their port when they are made."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Generator, Sequence
from functools import partial
from typing import cast

import grpc
import uvicorn
from starlette.types import ASGIApp

from hasten.core.errors import ConfigError
from hasten.server.access import AccessLog
from hasten.server.connections import Connections
from hasten.server.options import EndpointOptions, SecurityOptions
from hasten.server.protocol.grpc import GrpcCalls, add_to_server
from hasten.server.security import ApiKeys, TlsFiles

_BACKLOG = 2048
_CHECK_TICKS = 5
"""Of uvicorn's main loop, ten a second, between two looks at the connections' time-outs."""

_FOLLOW_S = 1.0
"""In which those who answer a request find its client gone."""
_ENDS, _SECURITY = EndpointOptions(), SecurityOptions()


def open_port(address: str, port: int, flag: str) -> socket.socket:
    """A listening socket; port 0 is any free one. ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio turns delays off only for sockets that say that they are TCP
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {joined(address, port)} ({flag}): {reason}") from error
    return listener


def joined(address: str, port: int) -> str:
    """Address and port as one text."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the application, and tells when it serves."""

    def __init__(self, config: uvicorn.Config, connections: Connections, tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self.serves = asyncio.Event()
        self._connections = connections
        self._tls = tls
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is None or sockets is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            state = {"server_state": self.server_state, "app_state": self.lifespan.state}
            protocol = partial(self._connections, config=self.config, **state)
            accept = partial(self._connections.accept_encrypted, tls=self._tls, protocol=protocol)
            self._accepting = [asyncio.create_task(accept(listener)) for listener in sockets]
        self.serves.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        if counter % _CHECK_TICKS == 0:
            self._connections.check()
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpListener:
    """Serves one ASGI application on one port."""

    def __init__(
        self,
        address: str,
        port: int,
        flag: str,
        tls: TlsFiles | None = None,
        ends: EndpointOptions = _ENDS,
        security: SecurityOptions = _SECURITY,
    ) -> None:
        self._socket = open_port(address, port, flag)
        self._ends = ends
        self._connections = Connections(ends, security)
        self._tls = None if tls is None else tls.context()
        self._server: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None
        self.port: int = self._socket.getsockname()[1]
        self.address = joined(address, self.port)

    async def start(self, app: ASGIApp) -> None:
        """Begin to serve."""
        config = uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], self._connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing depends on where a client is
            timeout_keep_alive=max(1, round(self._ends.http_idle_timeout_secs)),
            timeout_graceful_shutdown=None,  # `stop` closes the connections
        )
        self._server = _Uvicorn(config, self._connections, self._tls)
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        started = asyncio.ensure_future(self._server.serves.wait())
        await asyncio.wait((self._task, started), return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._task.done():
            self._task.result()

    async def stop(self, grace: float) -> None:
        """Take no more connections, give those under way `grace` seconds, and close the port.

        May be cancelled, and called again with less grace.
        """
        if self._server is not None and self._task is not None:
            self._connections.refuse_unfinished()
            self._server.force_exit = grace == 0
            self._server.should_exit = True
            # unlike awaiting the task, this leaves it alone where it is cancelled
            await asyncio.wait((self._task,), timeout=grace)
            # those who do not read what they asked for; to cancel who answers them would be logged as a fault
            self._connections.abort()
            await asyncio.wait((self._task,), timeout=_FOLLOW_S)
            self._server.force_exit = True
            await asyncio.wait((self._task,))
            self._task.result()
        self.close()

    def close(self) -> None:
        """Close the port of a listener that does not serve."""
        self._socket.close()


class GrpcListener:
    """Serves Triton's gRPC calls on one port."""

    def __init__(
        self,
        address: str,
        port: int,
        flag: str,
        calls: GrpcCalls,
        *,
        keys: ApiKeys | None = None,
        tls: TlsFiles | None = None,
        options: Sequence[tuple[str, int]] = (),
        access: AccessLog | None = None,
    ) -> None:
        # gRPC says little of why it could not have a port
        open_port(address, port, flag).close()
        # two servers on one port would share its clients
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *options])
        add_to_server(self._server, calls, keys, access or AccessLog())
        try:
            self.port: int = self._bind(joined(address, port), tls)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {joined(address, port)} ({flag}): {error}") from error
        self.address = joined(address, self.port)

    def _bind(self, address: str, tls: TlsFiles | None) -> int:
        if tls is None:
            return int(self._server.add_insecure_port(address))
        certificate, key, client_ca = tls.read()
        credentials = grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
        )
        return int(self._server.add_secure_port(address, credentials))

    async def start(self) -> None:
        """Begin to serve."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those under way `grace` seconds, and close the port."""
        await self._server.stop(grace)
