"""How long the phases of an engine's start take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("device", "config", "weights", "compile", "scales", "memory", "cache", "kernels", "graphs")
"""In order, but on a CPU `compile` is before `weights`, which are packed for the kernels. `device`: a GPU's context;
`compile`: kernels of all kinds of steps, by several threads; `scales`: those of a cache in 8 bits, where they are
measured; `memory`: the largest step, which shows what is left for the cache; `kernels`: steps of all kinds, which load
what they need; `graphs`: the capture of the first of them. The tokenizer is read when it is first needed."""


class StartTimes:
    """Seconds of each phase, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what the block does."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
