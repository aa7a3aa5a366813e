"""Processes that start as copies of one that has imported all they need: ranks, for tests of what they compute, and
batches, for tests that kill many.

How ranks start in earnest is shown by tests/parallel/test_launch.py.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext


@cache
def forking() -> ForkServerContext:
    """Starts processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hasten.engine.follower", "tests.batch.simulated"])
    return context


def _be_rank(configuration: Connection, errors: Connection, environment: dict[str, str]) -> None:
    """What `python -m hasten.engine.follower` does."""
    import torch

    from hasten.engine import follower

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.dup2(configuration.fileno(), 0)
    sys.stdin = os.fdopen(0)
    sys.argv = ["follower", str(errors.fileno())]
    follower.main()


class ForkedRank:
    """What `subprocess.Popen` is to `hasten.parallel.children`."""

    def __init__(
        self, command: list[str], stdin: int, env: dict[str, str], pass_fds: list[int], start_new_session: bool
    ) -> None:
        assert command[1:3] == ["-m", "hasten.engine.follower"]
        reader, writer = os.pipe()
        self.stdin = os.fdopen(writer, "wb")
        with Connection(reader, writable=False) as theirs, Connection(os.dup(pass_fds[0]), readable=False) as errors:
            self._process = forking().Process(target=_be_rank, args=(theirs, errors, env), daemon=True)
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:  # a second reader of the exit code would find none
            self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("rank", timeout)
        return code

    def kill(self) -> None:
        self._process.kill()
