"""An HTTP client for streams: connections that are kept, and each event's time as its bytes arrive.

Events are read in the transport's own callback: no task has to wake up for them, so that a process keeps up with tens
of thousands of them a second. Proxies of the environment are not used: they would be measured, too.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import httptools

from hasten.bench.load.address import Address
from hasten.bench.load.reply import RequestError

Receive = Callable[[float, bytes], None]
"""Takes the time and the data of each server-sent event."""
_OK = 200
_STREAM = b"text/event-stream"


class HttpClient:
    """Connections to one server."""

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self._address = address
        self._tls = ssl.create_default_context() if address.tls else None
        self._free: list[_Connection] = []
        lines = [f"Host: {address.authority}", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "\r\n".join(lines)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request."""
        head = f"{method} {path} HTTP/1.1\r\n{self._head}\r\n"
        if body:
            head += "Content-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def stream(self, request: bytes, receive: Receive) -> None:
        """Send a request and pass on the events of its answer until it ends; RequestError says how it failed."""
        await self._exchange(request, receive)

    async def fetch(self, request: bytes) -> bytes:
        """Send a request; the body of its answer."""
        return await self._exchange(request, None)

    async def aclose(self) -> None:
        """Close the connections."""
        for connection in self._free:
            connection.close()
        await asyncio.sleep(0)  # in which the transports close their sockets

    async def _exchange(self, request: bytes, receive: Receive | None) -> bytes:
        connection, is_used = await self._connection()
        try:
            try:
                body = await connection.exchange(request, receive)
            except _Unanswered as error:
                # a server may end a connection that it has kept just when the next request is on its way
                if not is_used:
                    raise error.cause from None
                connection = await self._connect()
                body = await connection.exchange(request, receive)
        except _Unanswered as error:
            raise error.cause from None
        finally:
            connection.release(self._free)
        return body

    async def _connection(self) -> "tuple[_Connection, bool]":
        while self._free:
            connection = self._free.pop()
            if connection.is_open:
                return connection, True
        return await self._connect(), False

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                _Connection, self._address.host, self._address.port, ssl=self._tls
            )
        except ssl.SSLError as error:
            raise RequestError("TLS error", f"{self._address}: {error}") from None
        except ConnectionRefusedError:
            raise RequestError("connection refused", f"{self._address}: nothing listens there") from None
        except OSError as error:
            raise RequestError("no connection", f"{self._address}: {error.strerror or error}") from None
        return connection


class _Unanswered(Exception):  # noqa: N818 - it never leaves this file
    """A connection that ended before the first byte of an answer."""

    def __init__(self, cause: RequestError) -> None:
        self.cause = cause


class _Connection(asyncio.Protocol):
    """A connection with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: _Answer | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, receive: Receive | None) -> bytes:
        """The body of the answer to a request; empty where its events went to `receive`."""
        assert self._transport is not None
        self._answer = _Answer(receive, asyncio.get_running_loop().create_future())
        self._transport.write(request)
        return await self._answer.done

    def release(self, free: "list[_Connection]") -> None:
        """Keep the connection where it may have another request, close it otherwise."""
        if self._answer is not None and self._answer.leaves_open and self.is_open:
            free.append(self)
        else:
            self.close()
        self._answer = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are no subclasses of asyncio's

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(time.perf_counter(), data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None:
            self._answer.connection_lost(error)


class _Answer:
    """The answer to one request, parsed as it arrives."""

    def __init__(self, receive: Receive | None, done: "asyncio.Future[bytes]") -> None:
        self.done = done
        self.leaves_open = False
        self._receive = receive
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._begun = self._is_stream = self._is_framed = False
        self._body = bytearray()

    def feed(self, now: float, data: bytes) -> None:
        self._now, self._begun = now, True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ if isinstance(error.__context__, Exception) else error)
        except httptools.HttpParserError as error:
            self._fail(RequestError("invalid HTTP", f"the server's answer is not HTTP/1.1: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None and self._parser_has_head and not self._is_framed:
            self.on_message_complete()
            return
        cause = RequestError("connection lost", f"the connection ended before the answer did: {error or 'closed'}")
        self._fail(cause if self._begun else _Unanswered(cause))

    @property
    def _parser_has_head(self) -> bool:
        return self._begun and bool(self._parser.get_status_code())

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._is_framed = True
        elif name == b"content-type":
            self._is_stream = value.lower().startswith(_STREAM)

    def on_body(self, data: bytes) -> None:
        self._body += data
        if self._receive is None or not self._is_stream or self._parser.get_status_code() != _OK:
            return
        end = self._body.rfind(b"\n") + 1
        if end:
            lines = bytes(self._body[:end]).split(b"\n")
            del self._body[:end]
            for line in lines:
                if line.startswith(b"data:"):
                    self._receive(self._now, line[5:].strip())

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        with suppress(httptools.HttpParserError):
            self.leaves_open = self._is_framed and bool(self._parser.should_keep_alive())
        if status != _OK:
            said = self._body.decode(errors="replace").strip() or "no body"
            self._fail(RequestError(f"HTTP {status}", f"HTTP {status}: {said}"))
        elif self._receive is not None and not self._is_stream:
            self._fail(RequestError("no stream", "the server answered with a body that is not text/event-stream"))
        elif not self.done.done():
            self.done.set_result(bytes(self._body))
