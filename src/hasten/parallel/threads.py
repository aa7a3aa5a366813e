"""How many threads torch computes with."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hasten.core.cpus import available_cpus

_WAITED = 0.2
"""Part of the time of steps on all threads for which threads wait for a CPU; above that, other programs use them."""
_WATCHED_S = 0.05
"""Seconds of such steps after which that is looked at, which takes a tenth of a millisecond."""
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


def waited_for_cpus() -> float:
    """Seconds for which all threads of this process together have waited for a CPU so far; 0 where it is not known.

    Linux counts them for each thread (/proc/PID/task/TID/schedstat).
    """
    waited = 0
    with suppress(OSError), os.scandir("/proc/self/task") as tasks:
        for task in tasks:
            with suppress(OSError, IndexError):  # a thread that ends, or a system that does not count
                waited += int(Path(task.path, "schedstat").read_bytes().split()[1])
    return waited / 1e9


class ThreadChoice:
    """Whether a step is computed on all of torch's threads or on one.

    Threads wait for each other some times per layer. Where other programs use the same CPUs, a step is as late as the
    thread that the system runs last, and one thread, which waits for nobody, may be several times as fast. Whether
    others do is seen by how long threads wait for a CPU; while they do not, all steps are computed on all threads.
    What follows a step, the choice of its tokens, is too short to be timed and has the same number (`rest_of_step`).
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, waited: Callable[[], float] = waited_for_cpus
    ) -> None:
        self._clock, self._waited_for_cpus = clock, waited
        self._recent: dict[int, _Recent] = {}
        """Of steps by the logarithm of their tokens."""
        self._is_contended = False
        self._before: float | None = None
        """What had been waited when the last step on one thread had ended, or since the last look."""
        self._watched, self._waited = 0.0, 0.0
        """Seconds of steps on all threads since then, and what was waited in them."""
        self._is_alone = False
        """Whether the last step was computed on one thread where there are several."""

    def rest_of_step(self) -> AbstractContextManager[None]:
        """The block that goes on with what the last step computed, on as many threads as that."""
        return _on_one_thread() if self._is_alone else nullcontext()

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """The block that computes a step of so many tokens; its thread's number of threads is as before after it."""
        most = torch.get_num_threads()
        if most == 1:
            self._is_alone = False
            yield
            return
        recent = self._recent.setdefault(tokens.bit_length(), _Recent())
        threads = _next(recent, most) if self._is_contended else most
        self._is_alone = threads != most
        if self._is_alone:
            self._stop_watch()
        elif self._before is None:
            self._before = self._waited_for_cpus()
        began = self._clock()
        with self.rest_of_step():
            yield
        seconds = self._clock() - began
        if threads == most:
            self._watched += seconds
            if self._watched >= _WATCHED_S:
                self._stop_watch()
                self._is_contended = self._waited > _WAITED * self._watched
                self._watched, self._waited = 0.0, 0.0
        _observe(recent, threads, seconds / tokens)

    def _stop_watch(self) -> None:
        if self._before is not None:
            self._waited += max(0.0, self._waited_for_cpus() - self._before)  # less where a thread has ended
            self._before = None


@contextmanager
def _on_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
