"""Progress of commands that take minutes, as lines on standard error."""

import sys
import time
from collections.abc import Callable


def progress_lines() -> Callable[[str], None]:
    """A function that writes lines, each with the seconds since this call."""
    start = time.perf_counter()

    def say(words: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {words}", file=sys.stderr, flush=True)

    return say
