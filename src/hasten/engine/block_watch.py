"""How long blocks of the cache live, lie idle and wait to be used again, of a sample of them. Never imports torch."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

WATCHED_ONE_IN = 64
"""Blocks that are handed out for each that is watched, on average: a step costs the same with and without."""


@dataclass
class BlockTimes:
    """Times of watched blocks, in seconds, in the order in which they became known."""

    lifetimes: list[float] = field(default_factory=list)
    """From when a block was handed out until its content was lost: it was handed out anew, or let go with nothing to
    keep."""
    idle: list[float] = field(default_factory=list)
    """From when nobody held a block with content any longer until it was handed out anew."""
    reuse_gaps: list[float] = field(default_factory=list)
    """From one use of a block to the next: when it was handed out, and each time that a prompt found it."""


@dataclass(slots=True)
class _Watched:
    taken: float
    used: float
    freed: float | None = None


class BlockWatch:
    """Watches one in `every` blocks that a block manager hands out, chosen at random, until their content is lost."""

    def __init__(
        self, every: int = WATCHED_ONE_IN, *, seed: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every = every
        self._random = random.Random(seed)
        self._clock = clock
        self._watched: dict[int, _Watched] = {}
        self._until_next = self._distance()
        self._times = BlockTimes()

    def _distance(self) -> int:
        """To the next block that is watched: varied, since requests of equal length take blocks at equal distances."""
        return self._random.randrange(2 * self._every - 1) + 1

    def taken(self, block: int) -> None:
        """A block is handed out, and what it held is lost."""
        if block in self._watched:
            now, old = self._clock(), self._watched.pop(block)
            self._times.lifetimes.append(now - old.taken)
            if old.freed is not None:
                self._times.idle.append(now - old.freed)
        self._until_next -= 1
        if self._until_next == 0:
            self._until_next, now = self._distance(), self._clock()
            self._watched[block] = _Watched(now, now)

    def found(self, block: int) -> None:
        """A prompt found a block that holds part of it."""
        if (times := self._watched.get(block)) is not None:
            now = self._clock()
            self._times.reuse_gaps.append(now - times.used)
            times.used, times.freed = now, None

    def freed(self, block: int, *, kept: bool) -> None:
        """Nobody holds a block any longer; `kept`: it has content that a prompt may find."""
        if (times := self._watched.get(block)) is None:
            return
        now = self._clock()
        if kept:
            times.freed = now
        else:
            del self._watched[block]
            self._times.lifetimes.append(now - times.taken)

    def forgotten(self) -> None:
        """Nothing that blocks hold can be found any more: those that were watched say nothing of the cache now."""
        self._watched.clear()

    def take(self) -> BlockTimes | None:
        """What became known since the last call, if anything."""
        times = self._times
        if not (times.lifetimes or times.idle or times.reuse_gaps):
            return None
        self._times = BlockTimes()
        return times
