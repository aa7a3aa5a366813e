"""HTTP/1.1 over plain sockets: to send what no proper client would, and to leave as no proper client does."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httptools

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER for a close that throws away what is under way."""
_CONTINUE, _TOO_LARGE = 100, 413


class NoAnswerError(Exception):
    """The server closed the connection before its answer was whole."""


@dataclass
class Answer:
    """A response."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection; several requests may follow each other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._begin()

    @classmethod
    async def open(cls, port: int, *, receive_buffer: int = 0) -> "Connection":
        """Connect. With a receive buffer of few bytes the server soon notices that nobody reads."""
        with contextlib.ExitStack() as closing:
            sock = closing.enter_context(socket.socket())
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or _CHUNK)
            closing.pop_all()  # the writer's from now on
        return cls(reader, writer)

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer()
        self._pieces: list[bytes] = []
        self._has_head = self._complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._has_head = self._answer.status != _CONTINUE

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = self._has_head

    async def send(self, raw: bytes) -> None:
        """Send bytes as they are. That the server listens no more shows in the answer."""
        self._begin()
        with contextlib.suppress(ConnectionError):
            self._writer.write(raw)
            await self._writer.drain()

    async def _read(self) -> None:
        try:
            data = await self._reader.read(_CHUNK)
        except ConnectionError as error:
            raise NoAnswerError(f"{error} after {self._answer}") from error
        if not data:
            raise NoAnswerError(f"the connection was closed after {self._answer}")
        self._parser.feed_data(data)

    async def head(self) -> Answer:
        """Status and headers of the answer."""
        while not self._has_head:
            await self._read()
        return self._answer

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        while self._pieces or not self._complete:
            if not self._pieces:
                await self._read()
            yield b"".join(self._pieces)
            self._pieces.clear()

    async def answer(self) -> Answer:
        """The whole answer."""
        found = await self.head()
        found.body = b"".join([piece async for piece in self.pieces()])
        return found

    async def events(self) -> AsyncIterator[str]:
        """The data of server-sent events."""
        held = b""
        async for piece in self.pieces():
            *whole, held = (held + piece).split(b"\n\n")
            for event in whole:
                yield event.decode().removeprefix("data: ")

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow; not behind one that was refused before its body was read."""
        return (
            self._complete
            and self._answer.status != _TOO_LARGE
            and self._answer.headers.get("connection", "") != "close"
        )

    def leave(self, *, reset: bool = False) -> None:
        """Close it; with `reset`, as a client does whose machine is gone."""
        with contextlib.suppress(OSError):
            if reset:
                # as a method of the transport's socket it would be refused
                found = socket.socket(fileno=self._writer.get_extra_info("socket").fileno())
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                found.detach()
        self._writer.transport.abort() if reset else self._writer.close()


def request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a proper request."""
    head = {"host": "localhost", "content-length": str(len(body)), **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """A connection that is closed at the end."""
    connection = await Connection.open(port)
    try:
        yield connection
    finally:
        connection.leave()


async def post(port: int, path: str, body: Any) -> Answer:
    """POST a JSON body."""
    async with connected(port) as connection:
        await connection.send(request("POST", path, json.dumps(body).encode()))
        return await connection.answer()


async def get(port: int, path: str) -> Answer:
    """GET a path."""
    async with connected(port) as connection:
        await connection.send(request("GET", path))
        return await connection.answer()
