"""Waiting for what happens in other processes and threads, however busy the machine is."""

import time
from collections.abc import Callable, Iterator
from itertools import count

LIMIT_S = 100.0
"""Ends a test that hangs, with what is otherwise; says nothing of how fast anything is."""


def eventually(condition: Callable[[], bool], what: Callable[[], str] = lambda: "", seconds: float = LIMIT_S) -> None:
    """Wait until a condition holds; fail with what is otherwise."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds:g} s: {what()}"
        time.sleep(0.01)


def attempts(what: str) -> Iterator[int]:
    """Numbers of attempts to see what a stall of any process may hide, such as a stream that is read while it is
    computed; leave the loop once it is seen. Fails with what was to be seen.
    """
    end = time.monotonic() + LIMIT_S
    for number in count():
        yield number
        assert time.monotonic() < end, f"not seen in {number + 1} attempts: {what}"
