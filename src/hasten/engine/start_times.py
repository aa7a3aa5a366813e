"""How long the phases of an engine's start take.

In order: `device`, a GPU's context; `config`; `weights`; `compile`, kernels of all kinds of steps, by several threads;
`scales`, those of a cache in 8 bits, where they are measured; `memory`, the largest step, which shows what is left for
the cache; `cache`; `kernels`, steps of all kinds, which load what they need; `graphs`, the capture of the first of
them. On a CPU `compile` comes before `weights`, which are packed for the kernels. The tokenizer is read when it is
first needed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
