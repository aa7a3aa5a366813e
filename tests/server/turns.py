"""Work counted by the turns of an event loop that it is done in: how busy the machine is makes no difference."""

import asyncio


class Turns:
    """Counts the turns of the event loop, and what is done in each of them."""

    def __init__(self) -> None:
        self._now = 0
        self._done: dict[int, int] = {}
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._now += 1
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def count(self) -> None:
        self._done[self._now] = self._done.get(self._now, 0) + 1

    @property
    def total(self) -> int:
        return sum(self._done.values())

    @property
    def most(self) -> int:
        return max(self._done.values())

    def close(self) -> None:
        self._handle.cancel()
