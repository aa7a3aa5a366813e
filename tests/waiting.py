"""Waiting for what happens in other processes and threads, however busy the machine is."""

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

LIMIT_S = 300.0
"""Ends a test that hangs, with what is otherwise; says nothing of how fast anything is."""


def eventually(condition: Callable[[], bool], what: Callable[[], str] = lambda: "", seconds: float = LIMIT_S) -> None:
    """Wait until a condition holds; fail with what is otherwise."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds:g} s: {what()}"
        time.sleep(0.01)


def await_idle(pid: int) -> None:
    """Wait until a process waits for others: its main thread sleeps and takes no CPU time for half a second."""

    def state() -> tuple[str, str, str]:
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[11], fields[12]

    last, since = state(), time.monotonic()

    def idle() -> bool:
        nonlocal last, since
        if (now := state()) != last or now[0] != "S":
            last, since = now, time.monotonic()
        return time.monotonic() - since > 0.5

    eventually(idle, lambda: f"process {pid} is {last}")


def attempts(what: str) -> Iterator[int]:
    """Numbers of attempts to see what a stall of any process may hide, such as a stream that is read while it is
    computed; leave the loop once it is seen. Fails with what was to be seen.
    """
    end = time.monotonic() + LIMIT_S
    for number in count():
        yield number
        assert time.monotonic() < end, f"not seen in {number + 1} attempts: {what}"
