"""Runs of the command, in this process and in one of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from tests.cli.memory_backend import MemoryBackend
from tests.waiting import LIMIT_S

from hasten.cli.cluster import backend as cluster_backend
from hasten.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str


Hasten = Callable[..., Done]


@pytest.fixture
def hasten_here(capsys: pytest.CaptureFixture[str]) -> Hasten:
    """Run `hasten` with some arguments in this process, which spares the time to import torch anew."""

    def run(*argv: object) -> Done:
        status = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return run


@pytest.fixture
def hasten_process() -> Hasten:
    """Run `hasten` as its users do, in a process of its own."""

    def run(*argv: object, stdin: str = "", launcher: tuple[str, ...] = (sys.executable,)) -> Done:
        done = subprocess.run(
            [*launcher, "-m", "hasten", *(str(arg) for arg in argv)],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> MemoryBackend:
    """The backend that `hasten cluster` asks, for this test: in memory."""
    backend = MemoryBackend()
    monkeypatch.setitem(cluster_backend.BACKENDS, "local", lambda args: backend)
    monkeypatch.delenv("HASTEN_CLUSTER", raising=False)
    return backend
