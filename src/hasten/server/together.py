"""Several things at once, none of which outlives the one that asked for them."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any


async def together(parts: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; once one fails, cancel the others and raise its error."""
    if len(parts) == 1:
        await parts[0]
        return
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(*tasks)


async def whenever(changed: asyncio.Event, work: Coroutine[Any, Any, None]) -> AsyncGenerator[bool, None]:
    """False whenever something has changed since the last look, True once the work is done; closing cancels it.

    All that changes while the caller is busy is one change.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda _: changed.set())
    try:
        while not task.done():
            await changed.wait()
            changed.clear()
            if not task.done():
                yield False
        task.result()
        yield True
    finally:
        await _cancel(task)


async def _cancel(*tasks: "asyncio.Future[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
