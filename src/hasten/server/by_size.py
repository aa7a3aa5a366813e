"""Work whose time grows with what a client sent: done at once while that is little, in a thread otherwise."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_SMALL = 64 << 10
"""Bytes that take less than about 10 ms, whatever they are."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def by_size(
    size: int, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The result of `work`, which has to look at `size` bytes."""
    if size <= _SMALL:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
