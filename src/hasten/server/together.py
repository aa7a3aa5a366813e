"""Several things at once: none outlives the caller, and no number of them holds up the event loop."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

TASKS_PER_TURN = 32
"""Tasks that begin, or are cancelled, in one turn of the event loop: each takes about 0.2 ms up to its first wait."""
Task = asyncio.Task[None]


@asynccontextmanager
async def running(parts: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[list[Task]]:
    """Tasks of coroutines, a few of which begin in each turn of the event loop.

    Those that still run are cancelled on exit.
    Raises the error of a task that fails while others have yet to begin.
    """
    tasks: list[Task] = []
    try:
        for part in parts:
            tasks.append(asyncio.create_task(part))
            if len(tasks) % TASKS_PER_TURN == 0:
                await asyncio.sleep(0)
                _raise_failure(tasks[-TASKS_PER_TURN:])
        yield tasks
    finally:
        for part in parts[len(tasks) :]:
            part.close()
        await _cancel(tasks)


def _raise_failure(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.done():
            task.result()


async def together(parts: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; once one fails, cancel the others and raise its error."""
    if len(parts) == 1:
        await parts[0]
        return
    async with running(parts) as tasks:
        # unlike `gather` it leaves it to `running` to cancel them
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        _raise_failure(tasks)


async def whenever(changed: asyncio.Event, work: Coroutine[Any, Any, None]) -> AsyncGenerator[bool, None]:
    """False whenever something has changed since the last look, True once the work is done; closing cancels it.

    All that changes while the caller is busy is one change.
    """
    task = asyncio.create_task(work)
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
        await _cancel([task])


async def _cancel(tasks: Sequence[Task]) -> None:
    """Cancel tasks and wait for their ends, the last one first: what waits behind others is gone before they are."""
    waiting = [task for task in reversed(tasks) if not task.done()]
    try:
        while waiting:
            now, waiting = waiting[:TASKS_PER_TURN], waiting[TASKS_PER_TURN:]
            for task in now:
                task.cancel()
            if waiting:
                await asyncio.sleep(0)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
