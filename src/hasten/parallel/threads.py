"""How many threads torch computes with."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hasten.core.cpus import available_cpus

_TRIED_FIRST = 4
"""Steps of a size with each number of threads before there is a choice."""
_TRIED_EVERY = 64
"""Steps, of which one tries the slower number of threads."""
_WEIGHT = 0.25
"""Of a new time in the mean of recent ones."""


def limit_threads() -> int:
    """Let torch use no more threads than the process has CPUs; returns their number.

    torch counts the CPUs of the machine and knows no container's quota: threads beyond it only wait for each other.
    OMP_NUM_THREADS is the user's own choice, and holds.
    """
    cpus = available_cpus()
    if "OMP_NUM_THREADS" not in os.environ and cpus < torch.get_num_threads():
        torch.set_num_threads(cpus)
    return torch.get_num_threads()


class ThreadChoice:
    """Whether steps are computed on all of torch's threads or on one, by how long they took lately.

    Threads wait for each other some times per layer. Where other programs use the same CPUs, a step is as late as the
    thread that the system runs last, and one thread, which waits for nobody, may be several times as fast.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[tuple[int, int], float] = {}
        """Size of a step as a power of two, and threads -> recent seconds per token."""
        self._tried: dict[tuple[int, int], int] = {}
        self._steps = 0

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """The block that computes a step of so many tokens; its thread's number of threads is as before after it."""
        most = torch.get_num_threads()
        if most == 1:
            yield
            return
        size = tokens.bit_length()
        threads = self._next(size, most)
        began = self._clock()
        if threads != most:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if threads != most:
                torch.set_num_threads(most)
        self._observe((size, threads), (self._clock() - began) / tokens)

    def _next(self, size: int, most: int) -> int:
        """The faster number of threads; at times the other, since what runs besides changes."""
        tried = {threads: self._tried.get((size, threads), 0) for threads in (most, 1)}
        if min(tried.values()) < _TRIED_FIRST:
            return most if tried[most] <= tried[1] else 1
        self._steps += 1
        many, one = self._seconds[size, most], self._seconds[size, 1]
        slower, faster = (1, most) if many <= one else (most, 1)
        return slower if self._steps % _TRIED_EVERY == 0 else faster

    def _observe(self, key: tuple[int, int], seconds: float) -> None:
        """Take the time of a step; the first of its kind, which makes and loads what others find, says nothing."""
        tried = self._tried[key] = self._tried.get(key, 0) + 1
        if tried == 2:
            self._seconds[key] = seconds
        elif tried > 2:
            self._seconds[key] += _WEIGHT * (seconds - self._seconds[key])
