"""Work whose time grows with what a client sent or asked for: done at once while that is little, else in a thread."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

SMALL = 64 << 10
"""Bytes that take less than about 10 ms, whatever they are."""
_THREADS = 2
"""More would wait for Python's lock, and the event loop behind all of them."""
_pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="by-size")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def by_size(
    size: int, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The result of `work`, which has to look at `size` bytes."""
    if size <= SMALL:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_pool, partial(work, *args, **kwargs))
