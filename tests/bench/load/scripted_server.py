"""An HTTP server that answers by a script and writes down when it has sent what, on the clock of its clients."""

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
MODELS = {"object": "list", "data": [{"id": "scripted"}]}


@dataclass
class Exchange:
    """One request, and the times at which the parts of its answer were handed to the system."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    arrived: float = field(default_factory=time.perf_counter)
    sent: list[float] = field(default_factory=list)
    connection: int = 0


@dataclass
class Script:
    """Writes the answer to one request."""

    exchange: Exchange
    writer: asyncio.StreamWriter

    def head(self, status: str = "200 OK", kind: str = "text/event-stream", *extra: str) -> None:
        lines = (f"HTTP/1.1 {status}", f"content-type: {kind}", "transfer-encoding: chunked", *extra)
        self.writer.write("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n")

    def send(self, *events: Any) -> None:
        """Some events in one chunk: JSON, or texts as they are."""
        data = b"".join(
            b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n" for event in events
        )
        self.exchange.sent.append(time.perf_counter())
        self.chunk(data)

    def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")

    def whole(self, status: str, value: Any, *extra: str) -> None:
        """A JSON body."""
        self.head(status, "application/json", *extra)
        self.chunk(json.dumps(value).encode())
        self.end()

    def leave(self) -> None:
        """Close the connection."""
        self.writer.close()


Answer = Callable[[Script], Awaitable[None]]


def text(piece: str, **more: Any) -> dict[str, Any]:
    """An event of OpenAI's completions."""
    return {"choices": [{"index": 0, "text": piece, "finish_reason": None}], **more}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The last event of a stream with usage."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


async def three_tokens(script: Script) -> None:
    """A stream of three tokens, 20 and 10 ms apart."""
    script.head()
    await asyncio.sleep(0.03)
    script.send(text("one"))
    await asyncio.sleep(0.02)
    script.send(text(" two"))
    await asyncio.sleep(0.01)
    script.send(text(" three"))
    script.send(usage(5, 3), "[DONE]")
    script.end()


@dataclass
class Server:
    """A server that runs, and what it was asked."""

    url: str
    exchanges: list[Exchange]

    @property
    def completions(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.method == "POST"]


@contextmanager
def scripted(answer: Answer = three_tokens, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server on a thread of its own."""
    exchanges: list[Exchange] = []
    ready: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []
    is_ready = threading.Event()
    connections = iter(range(10_000))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(connections)
        try:
            while not writer.is_closing():
                exchange = await _read(reader)
                exchange.connection = number
                exchanges.append(exchange)
                script = Script(exchange, writer)
                if exchange.path.endswith("/v1/models"):
                    script.whole("200 OK", MODELS)
                else:
                    await answer(script)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has left, or the server is to end
        finally:
            writer.close()

    async def serve() -> None:
        stop = asyncio.Event()
        async with await asyncio.start_server(connected, HOST, 0, ssl=tls) as server:
            ready.append((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
            is_ready.set()
            await stop.wait()
            server.close()
            current = asyncio.current_task()
            for task in (task for task in asyncio.all_tasks() if task is not current):
                task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    is_ready.wait()
    loop, stop, port = ready[0]
    try:
        yield Server(f"{'http' if tls is None else 'https'}://{HOST}:{port}", exchanges)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _read(reader: asyncio.StreamReader) -> Exchange:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Exchange(method, path, headers, json.loads(body) if body else None)
