"""HTTP connections with limits: of headers and URLs while they arrive, of time, and of their number."""

import asyncio
import fcntl
import http
import logging
import socket
import ssl
import struct
import termios
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from hasten.server.errors import error_response
from hasten.server.http_parser import HttpParser
from hasten.server.options import EndpointOptions, SecurityOptions
from hasten.server.sse import BODY, BodyWriter, Flow

_LINGER_S, _LINGER_BYTES = 2.0, 1 << 20
"""For how long a connection is read on whose request was refused: closed at once, the client would lose the answer."""
_LOG_EVERY_S = 60.0
_REFUSED_HANDSHAKES = 64
"""Handshakes beyond the limit of connections that are completed, so that their clients get the answer 503."""
_ACCEPT_AGAIN_S = 0.1
_LINE_BYTES = 4
"""Of a header's line beside its name and value: colon, space and line end."""
_log = logging.getLogger(__name__)


class Connections:
    """The open connections of one port, those included whose clients have yet to agree on their encryption."""

    def __init__(
        self,
        ends: EndpointOptions,
        security: SecurityOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ends = ends
        self.security = security
        self.clock = clock
        self._open: set[_Connection] = set()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._refused = 0
        self._logged = -_LOG_EVERY_S

    def __call__(self, **arguments: Any) -> "_Connection":
        """The protocol of one connection, as uvicorn asks for it."""
        return _Connection(self, **arguments)

    async def accept_encrypted(
        self, listener: socket.socket, tls: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        """Take connections until it is cancelled, each with a protocol once it is encrypted."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError:  # it is gone already, or no file descriptor is left
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            if not self._has_room(_REFUSED_HANDSHAKES):
                accepted.close()
                continue
            handshake = loop.create_task(self._encrypt(accepted, tls, protocol))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _encrypt(
        self, accepted: socket.socket, tls: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        most, connect = self.ends.http_header_timeout_secs, asyncio.get_running_loop().connect_accepted_socket
        try:
            await connect(protocol, accepted, ssl=tls, ssl_handshake_timeout=most)
        except OSError as error:
            _log.debug("a TLS handshake failed: %s", error)

    def opened(self, connection: "_Connection") -> bool:
        """Count a connection; False where there are too many."""
        has_room = self._has_room(spare=connection.scheme == "https")  # its own handshake is still counted
        if has_room:
            self._open.add(connection)
        return has_room

    def _has_room(self, spare: int = 0) -> bool:
        """Whether there may be a connection more, or `spare` ones too many; where not, that is logged once a minute."""
        count = len(self._open) + len(self._handshakes)
        if count < self.ends.http_max_connections + spare:
            return True
        self._refused += 1
        now = self.clock()
        if now - self._logged >= _LOG_EVERY_S:
            text = "%d connections are open, the limit is %d (--http-max-connections); refused since last logged: %d"
            _log.warning(text, count, self.ends.http_max_connections, self._refused)
            self._logged, self._refused = now, 0
        return False

    def closed(self, connection: "_Connection") -> None:
        """One connection is gone."""
        self._open.discard(connection)

    def refuse_unfinished(self) -> None:
        """Refuse the requests that have not come whole, since the server stops."""
        for connection in list(self._open):
            connection.refuse_unfinished()

    def abort(self) -> None:
        """Close all as they are."""
        for handshake in self._handshakes:
            handshake.cancel()
        for connection in list(self._open):
            connection.transport.abort()

    def check(self) -> None:
        """Close those whose time is up; to be called every now and then."""
        now = self.clock()
        for connection in list(self._open):
            connection.check(now)


class _HeadTooLargeError(Exception):
    """Ends the parser's work on a request that is refused."""


class _Connection(HttpToolsProtocol):
    """One connection."""

    flow: Flow

    def __init__(
        self,
        all_: Connections,
        config: Any,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser: HttpParser = HttpParser(self)  # type: ignore[assignment]
        self._all = all_
        self._ends = all_.ends
        self._max_header_bytes, self._max_url_bytes = all_.security.max_header_bytes, all_.security.max_url_bytes
        self._since = all_.clock()
        """When the phase began that the connection is in, or last moved on."""
        self._reading_head = self._reading_body = False
        self._head_bytes = 0
        """Of the URL and the headers, trailers included, that are whole."""
        self._unseen_bytes = 0
        """That the parser took since it last gave something."""
        self._parser_gave = False
        self._refusal: tuple[int, str] | None = None
        self._linger_until: float | None = None
        self._lingered_bytes = 0
        self._unread, self._unread_since = 0, 0.0
        """Bytes that the client has not taken, and since when there are that many."""

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)
        if not self._all.opened(self):
            self._refuse(503, "too many connections are open; try again later", {"retry-after": "1"})
            transport.close()  # it is not among those that are checked

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.closed(self)
        super().connection_lost(exc)
        self.flow.leave()

    def data_received(self, data: bytes) -> None:
        if self._linger_until is not None:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        if not self._reading_body and not self._reading_head:
            self._since = self._all.clock()
            self._reading_head = True
        self._parser_gave = False
        super().data_received(data)
        self._unseen_bytes = 0 if self._parser_gave else self._unseen_bytes + len(data)
        if self._unseen_bytes > self._max_header_bytes and self._linger_until is None:
            self._refusal = self._headers_too_large()
            self.send_400_response("")

    def _headers_too_large(self) -> tuple[int, str]:
        most = self._max_header_bytes
        return 431, f"the request's headers have more than {most} bytes, which is the limit; see --max-header-bytes"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if not self._reading_head:  # it begins behind another one, in the same piece
            self._reading_head, self._since = True, self._all.clock()

    def on_url(self, url: bytes) -> None:
        self._parser_gave = True
        super().on_url(url)
        if len(self.url) > self._max_url_bytes:
            most = self._max_url_bytes
            self._refusal = 414, f"the URL has more than {most} bytes, which is the limit; see --max-url-bytes"
            raise _HeadTooLargeError
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._parser_gave = True
        self._count(len(name) + len(value) + _LINE_BYTES)
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._max_header_bytes:
            self._refusal = self._headers_too_large()
            raise _HeadTooLargeError

    def on_headers_complete(self) -> None:
        self._parser_gave = True
        if self.parser.offers_upgrade:
            return
        self._since = self._all.clock()
        self._reading_head, self._reading_body = False, True
        super().on_headers_complete()
        self.scope["state"][BODY] = BodyWriter(self.cycle, self.flow)

    def on_body(self, body: bytes) -> None:
        self._parser_gave = True
        if not self.cycle.response_complete:  # what comes after the answer is waited for no longer than one piece
            self._since = self._all.clock()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._parser_gave = True
        if self.parser.offers_upgrade:
            return
        self._reading_head = self._reading_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._since = self._all.clock()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed, or is larger than it may be."""
        status, text = self._refusal or (400, msg)
        if self._answering and not self._reading_body:
            # its answer would come in the middle of another one's: the connection ends behind that instead
            self.cycle.keep_alive = False
            self._linger_until = float("inf")
        elif self._answering and self.cycle.response_started:
            self.transport.abort()
        else:
            self._refuse(status, text)

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        if self.transport.is_closing():
            return
        path = (getattr(self, "url", b"") or b"")[: self._max_url_bytes].decode("latin-1")
        answer = error_response(path, status, message, {"connection": "close", **(headers or {})})
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in answer.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        self._linger_until = self._all.clock() + _LINGER_S
        self._end_requests()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _end_requests(self) -> None:
        """Let nothing more be written: who answers a request finds its client gone, and further ones are dropped."""
        self.pipeline.clear()
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.leave()

    def refuse_unfinished(self) -> None:
        """Refuse a request of which a part has come, since the server stops."""
        if self._linger_until is not None or self.pipeline:
            return
        if (self._reading_head and not self._answering) or (self._reading_body and not self.cycle.response_started):
            self._refuse(503, "the server is stopping", {"retry-after": "1"})

    def check(self, now: float) -> None:
        """Close the connection if its client's time is up."""
        if self._write_stalls(now):
            self.transport.abort()
        elif self.transport.is_closing():
            return
        elif self._linger_until is not None:
            if now >= self._linger_until:
                self.transport.abort()
        elif self._reading_body:
            self._check_body(now)
        elif self._answering:
            self._since = now
        elif self._reading_head:
            if now - self._since > (most := self._ends.http_header_timeout_secs):
                self._refuse(408, f"the headers did not come within {most:g} s")
        elif now - self._since > self._ends.http_idle_timeout_secs:
            self.transport.close()

    def _check_body(self, now: float) -> None:
        if self.flow.read_paused:
            self._since = now  # it is not the client that is slow
        elif now - self._since > (most := self._ends.http_body_timeout_secs):
            if self.cycle.response_started:
                self.transport.abort()
            else:
                self._refuse(408, f"nothing of the body came for {most:g} s")

    def _write_stalls(self, now: float) -> bool:
        waiting = self.transport.get_write_buffer_size()
        # what the kernel holds counts too: it may take megabytes of reading until it takes more from here
        unread = waiting and waiting + _unsent(self.transport.get_extra_info("socket"))
        if unread == 0 or unread != self._unread:
            self._unread, self._unread_since = unread, now
            return False
        return now - self._unread_since > self._ends.http_write_timeout_secs


def _unsent(connection: Any) -> int:
    """Bytes that the kernel holds for the client and that it has not acknowledged."""
    (count,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(count)
