"""What listens: an HTTP server for an ASGI application, and a gRPC server. Both open their port when they are made."""

import asyncio
import socket
import time
from collections.abc import Sequence
from email.utils import formatdate
from functools import partial
from typing import cast

import grpc
import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from hasten.core.errors import ConfigError
from hasten.server.access import AccessLog
from hasten.server.connections import Connections
from hasten.server.options import EndpointOptions, SecurityOptions
from hasten.server.protocol.grpc import GrpcCalls, add_to_server
from hasten.server.security import ApiKeys, Tls

_BACKLOG = 2048
_TICK_S, _LOOK_S = 0.5, 0.05
"""Between two looks at the connections' time-outs, and at what is left when the server stops."""
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


class HttpListener:
    """Serves one ASGI application on one port."""

    def __init__(
        self,
        address: str,
        port: int,
        flag: str,
        tls: Tls | None = None,
        ends: EndpointOptions = _ENDS,
        security: SecurityOptions = _SECURITY,
    ) -> None:
        self._socket = open_port(address, port, flag)
        self._ends = ends
        self._connections = Connections(ends, security)
        self._tls = tls
        self._state = ServerState()
        """Of uvicorn's protocol: connections, and tasks that answer requests."""
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
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
        )
        config.load()
        protocol = partial(self._connections, config=config, server_state=self._state, app_state={})
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._tick(config)))
        if self._tls is None:
            self._server = await loop.create_server(protocol, sock=self._socket, backlog=_BACKLOG)
        else:
            accepting = self._connections.accept_encrypted(self._socket, self._tls.context, protocol)
            self._tasks.append(loop.create_task(accepting))

    async def _tick(self, config: uvicorn.Config) -> None:
        """Keep the date of answers right, and connections to their time-outs."""
        while True:
            date = formatdate(time.time(), usegmt=True).encode()
            self._state.default_headers = [(b"date", date), *config.encoded_headers]
            self._connections.check()
            await asyncio.sleep(_TICK_S)

    async def stop(self, grace: float) -> None:
        """Take no more connections, give those under way `grace` seconds, and close the port.

        May be cancelled, and called again with less grace.
        """
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._connections.refuse_unfinished()
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._ended(grace)
        # those who do not read what they asked for; to cancel who answers them would be logged as a fault
        self._connections.abort()
        await self._ended(_FOLLOW_S)
        self.close()

    async def _ended(self, seconds: float) -> None:
        """Wait until all connections and requests have ended, for some seconds at most."""
        end = time.monotonic() + seconds
        while (self._state.connections or self._state.tasks) and time.monotonic() < end:
            await asyncio.sleep(_LOOK_S)

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
        tls: Tls | None = None,
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

    def _bind(self, address: str, tls: Tls | None) -> int:
        if tls is None:
            return int(self._server.add_insecure_port(address))
        certificate, key, client_ca = tls.pem
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
