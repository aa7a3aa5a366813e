"""What tests of the engine's process do again and again."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from hasten.core.types import SamplingParams
from hasten.server.engine.client import EngineClient, Progress

LONG = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
"""Goes on for seconds."""
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


async def collect(
    client: EngineClient, prompt: str | Sequence[int], params: SamplingParams, **options: Any
) -> list[Progress]:
    """All progress of a request."""
    return [progress async for progress in client.generate(prompt, params, **options)]


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
    """A request that has got its first progress."""
    stream = client.generate(prompt, params, **options)
    await anext(stream)
    return stream


async def until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until something is so, and say how long it took; AssertionError after so many seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"not so within {seconds} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def error_of(request: Awaitable[Any]) -> Exception | None:
    """What a request raises."""
    try:
        await request
    except Exception as error:
        return error
    return None
