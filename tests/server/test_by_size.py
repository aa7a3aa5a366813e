"""Where work is done: at once, or on a thread beside the event loop."""

import asyncio
import threading

from hasten.server.by_size import SMALL, by_size


def test_only_what_takes_long_leaves_the_loops_thread() -> None:
    async def check() -> None:
        here = threading.current_thread()
        assert await by_size(SMALL, threading.current_thread) is here
        there = await by_size(SMALL + 1, threading.current_thread)
        assert there is not here
        assert there.name.startswith("by-size")

    asyncio.run(check())


def test_few_threads_compete_with_the_loop() -> None:
    """Whatever comes at once: each thread may hold Python's lock for a while before the loop has it again."""
    running, most = 0, 0

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        done.wait(0.05)
        running -= 1

    done = threading.Event()

    async def check() -> None:
        await asyncio.gather(*(by_size(SMALL + 1, work) for _ in range(16)))

    asyncio.run(check())
    assert most <= 2
