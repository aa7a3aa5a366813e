"""Processes that start as copies of one that has imported all they need: ranks and engines, for tests of what they
compute, and batches, for tests that kill many.

How they start in earnest is shown by tests/parallel/test_launch.py and tests/server/test_engine_process.py.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import process as multiprocessing_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from hasten.parallel import children
from hasten.server.engine import spawned


@cache
def forking() -> ForkServerContext:
    """Starts processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked", "hasten.engine.follower", "tests.batch.simulated"])
    return context


def _become(program: str, argument: int, standard_input: Connection, environment: dict[str, str], folder: str) -> None:
    """Be what `python -m PROGRAM ARGUMENT` is, in a session of its own."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(standard_input.fileno(), 0)
    sys.stdin = os.fdopen(0)
    sys.argv = [program, str(argument)]


def _be_rank(errors: Connection, *start: Any) -> None:
    import torch

    from hasten.engine import follower

    _become("follower", errors.fileno(), *start)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    follower.main()


def _be_engine(connection: Connection, standard_error: Connection, *start: Any) -> None:
    from hasten.server.engine import process

    _become("process", os.dup(connection.fileno()), *start)
    for standard in (1, 2):
        os.dup2(standard_error.fileno(), standard)
    process.main()


class _Forked:
    """What `subprocess.Popen` is to those who start processes with a descriptor and a pipe for their input."""

    def __init__(self, target: Callable[..., None], descriptors: list[int], environment: dict[str, str]) -> None:
        reader, writer = os.pipe()
        self.stdin = os.fdopen(writer, "wb")
        passed = [Connection(os.dup(each)) for each in descriptors]
        with Connection(reader, writable=False) as theirs:
            arguments = (*passed, theirs, environment, str(Path.cwd()))
            self._process = forking().Process(target=target, args=arguments, daemon=True)
            self._process.start()
        for connection in passed:
            connection.close()
        # Whoever starts another process, or ends this one, would wait for it, or read its exit code in our place.
        multiprocessing_process._children.discard(self._process)  # type: ignore[attr-defined]
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._reading = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired("a copy", timeout or 0)
        with self._reading:  # a second reader of the exit code would find none
            code = self._process.exitcode
        assert code is not None
        return code

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stdin.close()
        self.wait()


class ForkedRank(_Forked):
    """What `subprocess.Popen` is to `hasten.parallel.children`."""

    def __init__(
        self, command: list[str], stdin: int, env: dict[str, str], pass_fds: list[int], start_new_session: bool
    ) -> None:
        assert command[1:3] == ["-m", "hasten.engine.follower"]
        super().__init__(_be_rank, pass_fds, env)


class ForkedEngine(_Forked):
    """What `subprocess.Popen` is to `hasten.server.engine.spawned`."""

    def __init__(
        self, command: list[str], stdin: int, stdout: int, pass_fds: list[int], start_new_session: bool
    ) -> None:
        assert command[1:3] == ["-m", "hasten.server.engine.process"]
        super().__init__(_be_engine, [*pass_fds, stdout], dict(os.environ))


@contextmanager
def _instead_of_popen(module: Any, forked: type[_Forked]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": forked}))
        yield


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Ranks that an engine starts meanwhile are copies of one process, which takes a tenth of the time of new ones."""
    with _instead_of_popen(children, ForkedRank):
        yield


@contextmanager
def forked_engines() -> Iterator[None]:
    """Engines that a server starts meanwhile are copies of one process."""
    with _instead_of_popen(spawned, ForkedEngine):
        yield
