"""How many threads torch computes with."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hasten.core.cpus import available_cpus

_USED = 0.85
"""Part of the time of its threads for which a step had CPUs; below that, other programs use them."""
_TRIED_FIRST = 3
"""Steps of a size with each number of threads before there is a choice."""
_TRIED_EVERY = 32
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


@dataclass
class _Recent:
    """What steps of a size took lately."""

    tried: dict[int, int] = field(default_factory=dict)
    """Steps with each number of threads."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Mean seconds per token with each number of threads."""
    steps: int = 0


class ThreadChoice:
    """Whether a step is computed on all of torch's threads or on one.

    Threads wait for each other some times per layer. Where other programs use the same CPUs, a step is as late as the
    thread that the system runs last, and one thread, which waits for nobody, may be several times as fast. Whether
    others do is seen by the CPU time that steps get; while they do not, all steps are computed on all threads.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._recent: dict[int, _Recent] = {}
        """Of steps by the logarithm of their tokens."""
        self._is_contended = False

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """The block that computes a step of so many tokens; its thread's number of threads is as before after it."""
        most = torch.get_num_threads()
        if most == 1:
            yield
            return
        recent = self._recent.setdefault(tokens.bit_length(), _Recent())
        threads = _next(recent, most) if self._is_contended else most
        began, used = self._clock(), self._cpu_clock()
        if threads != most:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if threads != most:
                torch.set_num_threads(most)
        seconds = self._clock() - began
        if threads == most:
            self._is_contended = self._cpu_clock() - used < _USED * most * seconds
        _observe(recent, threads, seconds / tokens)


def _next(recent: _Recent, most: int) -> int:
    """The faster number of threads; at times the other, since what runs besides changes."""
    tried = {threads: recent.tried.get(threads, 0) for threads in (most, 1)}
    if min(tried.values()) < _TRIED_FIRST:
        return most if tried[most] <= tried[1] else 1
    recent.steps += 1
    slower, faster = (1, most) if recent.seconds[most] <= recent.seconds[1] else (most, 1)
    return slower if recent.steps % _TRIED_EVERY == 0 else faster


def _observe(recent: _Recent, threads: int, seconds: float) -> None:
    """Take the time of a step; the first of its kind, which makes and loads what others find, says nothing."""
    tried = recent.tried[threads] = recent.tried.get(threads, 0) + 1
    if tried == 2:
        recent.seconds[threads] = seconds
    elif tried > 2:
        recent.seconds[threads] += _WEIGHT * (seconds - recent.seconds[threads])
