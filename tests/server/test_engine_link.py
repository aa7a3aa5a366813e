"""What the server tells an engine of the time that writing its steps took, as the engine reads it."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
import pytest

from hasten.server.engine.link import Delivery, EngineLink
from hasten.server.engine.wire import Acknowledge, Frames, Step, ToEngine, framed


def work(seconds: float) -> None:
    """Take this much CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def linked(on_steps: Callable[[list[Step]], None]) -> tuple[EngineLink, socket.socket]:
    """A link to a process that does nothing, and the engine's end of its socket."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    link = EngineLink(process, on_steps, Delivery())
    ours.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
    return link, theirs


async def acknowledged(*turns: tuple[float, float]) -> list[float]:
    """CPU seconds that are reported of steps, each with the work of its readers and the work until the next ones."""
    costs = iter([writing for writing, _ in turns])
    link, theirs = await linked(lambda _: work(next(costs)))
    decode, frames, reported = msgspec.msgpack.Decoder(ToEngine).decode, Frames(), []
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    for _, afterwards in turns:
        link.data_received(bytes(framed(Step())))
        bodies: list[bytes] = []
        while not bodies:
            data = await reader.read(1 << 16)
            assert data, "the link has closed its end"
            bodies += frames.feed(data)
        (message,) = map(decode, bodies)
        assert isinstance(message, Acknowledge)
        reported.append(message.cpu_seconds)
        work(afterwards)
    await link.close()
    writer.close()
    return reported


async def sent_in_a_turn(frames: list[bytearray]) -> tuple[bytes, bytes]:
    """What of these messages, sent in one turn of the event loop, has left within it, and what comes with the next."""
    link, theirs = await linked(lambda _: None)
    theirs.setblocking(False)
    for frame in frames:
        link.send_frame(frame)
    within = theirs.recv(1 << 20)
    await asyncio.sleep(0)
    after = theirs.recv(1 << 20)
    await link.close()
    theirs.close()
    return within, after


def test_the_first_requests_of_a_burst_leave_before_the_last_are_read() -> None:
    frames = [bytearray([number]) * 1000 for number in range(40)]
    within, after = asyncio.run(sent_in_a_turn(frames))
    assert (within, after) == (b"".join(frames[:34]), b"".join(frames[34:]))


def test_what_goes_on_behind_a_message_counts_with_the_next_one() -> None:
    first, second, third = asyncio.run(acknowledged((0.1, 0.05), (0.1, 0.5), (0.1, 0.0)))
    # before the first message all was other work, of which no more counts than the message itself took
    assert first == pytest.approx(0.2, abs=0.04)
    assert second == pytest.approx(0.15, abs=0.04)
    assert third == pytest.approx(0.2, abs=0.04)
