"""Deferred work on a CPU: steps computed again where a graph would be replayed, and ranks with pieces of work to do.

As a program it is a rank that follows rank 0.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from hasten.engine import follower
from hasten.engine.cache_setup import CacheSetup
from hasten.engine.deferred import Piece
from hasten.engine.graphs import StepOutput


class Recomputed:
    """A step computed anew in the place of a graph's replay, into the same output."""

    def __init__(self, compute: Callable[[], StepOutput], output: StepOutput) -> None:
        self._compute, self._output = compute, output

    def replay(self) -> None:
        """Compute it, over what its numbers are now."""
        new = self._compute()
        for name, old in vars(self._output).items():
            if old is not None:
                old.copy_(getattr(new, name))


class Recomputing:
    """In the place of CUDA's capture. `fails`: the numbers of captures, from 1, for which there is no memory."""

    def __init__(self, fails: frozenset[int] = frozenset()) -> None:
        self.captured = 0
        """How often that was tried."""
        self._fails = fails
        self._outputs = deque[StepOutput]()

    def launch(self, compute: Callable[[], StepOutput]) -> None:
        """Compute a step, whose output is then the graph's: while graphs are captured nothing is computed."""
        self._outputs.append(compute())

    def capture(self, compute: Callable[[], StepOutput]) -> tuple[Recomputed, StepOutput]:
        """A step to be computed again; steps come in the order in which they were launched."""
        self.captured += 1
        output = self._outputs.popleft()
        if self.captured in self._fails:
            raise torch.OutOfMemoryError("no memory of the device is left")
        return Recomputed(compute, output), output


MARKS = "HASTEN_TEST_MARKS"
"""Environment variable that names a folder, where each rank notes the pieces that it has done."""


@contextmanager
def defer_marks() -> Iterator[None]:
    """A block whose workers begin with three pieces of deferred work, each of which needs all ranks at once."""
    make = CacheSetup.make

    def deferring(setup: CacheSetup) -> tuple[int, int]:
        file = Path(os.environ[MARKS], f"rank {setup.ranks.world.rank}")

        def mark(number: int) -> None:
            assert setup.ranks.world.least(number) == number
            with file.open("a") as marks:
                marks.write(f"{number}\n")

        for number in range(3):
            setup.runner.deferred.add(Piece("a mark", partial(mark, number)))
        return make(setup)

    CacheSetup.make = deferring  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        CacheSetup.make = make  # type: ignore[method-assign]


if __name__ == "__main__":
    with defer_marks():
        follower.main()
