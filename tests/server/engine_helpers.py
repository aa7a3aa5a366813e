"""What tests of the engine's process do again and again."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.waiting import LIMIT_S, attempts

from hasten.core.config import EngineConfig
from hasten.core.types import SamplingParams
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import Queueing
from hasten.server.engine.ticket import Progress

LONG_TOKENS = 1500
LONG = SamplingParams(max_tokens=LONG_TOKENS, temperature=0, ignore_eos=True)
"""Goes on for seconds."""
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


async def generate(
    client: EngineClient, prompt: str | Sequence[int], params: SamplingParams, *, stream: bool = True, **queueing: Any
) -> AsyncGenerator[Progress, None]:
    """The progress of a request as it comes; closing the generator withdraws it."""
    ticket = await client.submit(prompt, params, Queueing(**queueing), stream=stream)
    try:
        while True:
            progress = await ticket.read()
            yield progress
            if progress.finished:
                return
    finally:
        client.withdraw(ticket)


async def collect(
    client: EngineClient, prompt: str | Sequence[int], params: SamplingParams, **options: Any
) -> list[Progress]:
    """All progress of a request."""
    return [progress async for progress in generate(client, prompt, params, **options)]


def joined(progress: list[Progress]) -> Progress:
    """The whole that pieces of progress add up to."""
    whole = progress[0]
    for later in progress[1:]:
        whole.merge(later)
    whole.completions.sort(key=lambda delta: delta.index)
    return whole


def count(progress: list[Progress]) -> int:
    """Tokens of all its pieces; how many there are in one is chance."""
    return sum(len(delta.token_ids) for piece in progress for delta in piece.completions)


async def begin(client: EngineClient, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Any:
    """A request that has got its first progress, and more to come."""
    for _ in attempts("a request that has begun, and has not ended"):
        stream = generate(client, prompt, params, **options)
        if not (await anext(stream)).finished:
            return stream
        await stream.aclose()


@asynccontextmanager
async def started(
    model: Path, *, name: str = "engine", stall_timeout: float = 600, **options: Any
) -> AsyncIterator[EngineClient]:
    """An engine of a test's own, closed at the end however the test ends."""
    config = EngineConfig.create(str(model), **options)
    client = await EngineClient.start(config, name=name, stall_timeout=stall_timeout)
    try:
        yield client
    finally:
        await client.close()


@contextmanager
def stopped(client: EngineClient) -> Iterator[None]:
    """The engine's process stands still: what it has not done yet, it does not do."""
    pid = client.replicas[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def until(condition: Callable[[], bool], seconds: float = LIMIT_S) -> None:
    """Wait until something is so. The limit is there to end a test that hangs: no machine is too busy for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        await asyncio.sleep(0.005)


async def error_of(request: Awaitable[Any]) -> Exception | None:
    """What a request raises."""
    try:
        await request
    except Exception as error:
        return error
    return None
