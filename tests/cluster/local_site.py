"""A local backend in a folder of its own, for tests: real processes, of which none may be left at the end."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import eventually

from hasten.cluster.backend import Job, LogOptions, Status
from hasten.cluster.local.backend import LocalBackend
from hasten.cluster.local.state import Folder, State
from hasten.cluster.spec import TrainingJob

PYTHON = sys.executable


class Site:
    """The backend, and short forms of what tests do with it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.backend = LocalBackend(home)

    def submit(self, name: str, command: str, **options: Any) -> None:
        self.backend.submit(TrainingJob(name=name, command=command, **options))

    def job(self, name: str) -> Job:
        return self.backend.job(name, "default")

    def ended(self, name: str) -> Job:
        return self.reaches(name, lambda job: job.status.ended)

    def running(self, name: str) -> Job:
        return self.reaches(name, lambda job: job.status is Status.RUNNING)

    def over(self, name: str) -> None:
        """Wait until nothing of a job changes any more: a process that ends gives its lock back after all else."""
        eventually(lambda: self.state(name).done and self._is_free(self.folder(name)), lambda: f"{self.job(name)}")

    def _is_free(self, folder: Folder) -> bool:
        lock = folder.try_lock()
        if lock is not None:
            os.close(lock)
        return lock is not None

    def reaches(self, name: str, wanted: Callable[[Job], bool]) -> Job:
        eventually(lambda: wanted(self.job(name)), lambda: f"{self.job(name)}")
        return self.job(name)

    def run(self, name: str, command: str, **options: Any) -> list[str]:
        """A job's output; it must succeed."""
        self.submit(name, command, **options)
        job = self.ended(name)
        assert job.status is Status.SUCCEEDED, f"{job}\n{self.logs(name)}"
        return self.logs(name)

    def logs(self, name: str, **options: Any) -> list[str]:
        return list(self.backend.job_logs(name, "default", LogOptions(**options)))

    def state(self, name: str) -> State:
        return self.folder(name).state()

    def folder(self, name: str) -> Folder:
        return Folder(self.home / "jobs" / "default" / name)

    def processes(self) -> list[int]:
        """All that have this backend's folder in their environment (see `site`): supervisors and instances."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and f"HASTEN_HOME={self.home}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        for server in self.backend.servers(None):
            self.backend.delete_server(server.name, server.version, server.namespace)
        for job in self.backend.jobs(None):
            self.backend.delete_job(job.name, job.namespace)
        eventually(lambda: not self.processes(), lambda: f"processes {self.processes()} are left")


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be buried does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


@contextmanager
def site(home: Path) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_HOME", str(home))
        site = Site(home)
        try:
            yield site
        finally:
            site.close()


def python(code: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """A Python process that runs some code, its output in pipes."""
    return subprocess.Popen(
        [PYTHON, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
