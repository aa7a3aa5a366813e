"""The process of an engine, seen from the server: how it starts, what it says, how it ends."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from hasten.core.errors import EngineError, HastenError, error_of
from hasten.server.engine import spawned as engine_processes
from hasten.server.engine.wire import Acknowledge, EngineInfo, Frames, FromEngine, Ready, Start, Step, framed
from hasten.server.exposition import Histogram

_LEAVE_S = 5.0
"""How long a process that is to end, or has closed its end, may take to leave, on a busy machine too."""
_MOST_QUEUED_BYTES = 16 << 10
"""Of messages that are sent together: the requests of a burst take milliseconds to read, and engines begin with the
first ones meanwhile."""
_DELIVERY_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)


@dataclass
class Delivery:
    """How long tokens take on their way, one value for each message of the engine that has some."""

    socket: Histogram = field(default_factory=lambda: Histogram(_DELIVERY_S))
    """From the engine's process until this one has read them."""
    write: Histogram = field(default_factory=lambda: Histogram(_DELIVERY_S))
    """From there until all streams have been given theirs."""


class EngineLink(asyncio.Protocol):
    """One engine's process and the socket to it. Made by `open`."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", on_steps: Callable[[list[Step]], None], delivery: Delivery
    ) -> None:
        loop = asyncio.get_running_loop()
        self.info: asyncio.Future[EngineInfo] = loop.create_future()
        """Comes when the model is loaded; the error where it cannot be."""
        self.lost: asyncio.Future[None] = loop.create_future()
        """Comes at once when the process has closed its end, which it does in dying."""
        self.ended: asyncio.Future[str] = loop.create_future()
        """Comes when the process has ended, and says how."""
        self.failure: HastenError | None = None
        """Why the process ended, where it could still say so."""
        self._process = process
        self._on_steps = on_steps
        self._delivery = delivery
        self._frames = Frames()
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._queued = bytearray()
        """Messages that are sent at the end of this turn of the event loop."""
        self._acknowledged_at = 0.0
        """This thread's CPU time when steps were last acknowledged."""
        self._afterwards = 0.0
        """CPU seconds from then until the next steps came."""
        self._transport: asyncio.WriteTransport
        self._reaping: asyncio.Task[None]

    @classmethod
    async def open(cls, start: Start, on_steps: Callable[[list[Step]], None], delivery: Delivery) -> "EngineLink":
        """Start a process that loads the model that `start` describes; OSError where the system cannot.

        `on_steps` gets all that its steps have brought since the last call.
        """
        spawned = engine_processes.start()
        link = cls(spawned.process, on_steps, delivery)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=spawned.connection)
        except BaseException:
            spawned.kill()
            raise
        link.send(start)
        return link

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Send a message, behind those that `send_frame` queued."""
        self._queued += framed(message)
        self._flush()

    def send_frame(self, frame: bytearray) -> None:
        """Send a message that `framed` made, with others of this turn of the event loop: requests come in bursts."""
        if not self._queued:
            asyncio.get_running_loop().call_soon(self._flush)
        self._queued += frame
        if len(self._queued) >= _MOST_QUEUED_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._queued and not self._transport.is_closing():
            self._transport.write(self._queued)
        self._queued = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is this object's."""
        # uvloop's transports are no subclasses of asyncio's
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes have come from the process."""
        began, read, steps = time.thread_time(), time.monotonic(), list[Step]()
        for body in self._frames.feed(data):
            message: FromEngine = self._decode(body)
            if isinstance(message, Step):
                steps.append(message)
            elif isinstance(message, Ready):
                self.info.set_result(message.info)
            else:
                self.failure = error_of(message.kind, message.message)
        if steps:
            self._afterwards = began - self._acknowledged_at
            self._on_steps(steps)
            # the readers that have woken up are before this in the loop's queue
            with_tokens = [step.sent for step in steps if step.outputs]
            asyncio.get_running_loop().call_soon(self._acknowledge, len(steps), began, read, with_tokens)

    def _acknowledge(self, steps: int, began: float, read: float, with_tokens: list[float]) -> None:
        written = time.monotonic()
        for sent in with_tokens:
            self._delivery.socket.observe(read - sent)
            self._delivery.write.observe(written - read)
        self._acknowledged_at = time.thread_time()
        spent = self._acknowledged_at - began
        # What gRPC does with messages goes on behind this callback: so it did after the steps before. It is not more
        # than what it took to begin them; the rest was for other requests.
        spent += min(spent, self._afterwards)
        if not self._transport.is_closing():
            self.send(Acknowledge(steps, spent))

    def connection_lost(self, error: Exception | None) -> None:
        """The process has closed its end, or `close` this one."""
        self.lost.set_result(None)
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        """Wait for the process to leave, end it where it does not, and say how it went."""
        code = await asyncio.to_thread(self._wait, _LEAVE_S)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if not self.info.done():
            text = f"the engine's process ended before the model was loaded ({how}); its own messages say more"
            self.info.set_exception(self.failure or EngineError(text))
            self.info.exception()  # nobody is obliged to ask
        self.ended.set_result(how)

    def _wait(self, seconds: float) -> int:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    async def close(self) -> None:
        """End the process, and wait until it has ended."""
        self._transport.close()
        await asyncio.shield(self.ended)
