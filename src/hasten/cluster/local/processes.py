"""Processes of this machine, as Linux's /proc tells: which one a record means, and all that belong to an instance."""

import os
import signal
import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

MARK = "HASTEN_INSTANCE"
"""Variable in the environment of an instance and of all that it starts: the job's uid, `/`, the instance's name."""

_PROC = Path("/proc")
_STATE, _SESSION, _START = 0, 3, 19
"""Places in /proc/PID/stat, after the name."""


def boot_id() -> str:
    """Which run of the kernel this is."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def host_name() -> str:
    """This machine's name."""
    return socket.gethostname()


def start_of(pid: int) -> int | None:
    """When a process started, in the kernel's own count; None where there is none."""
    stat = _stat(pid)
    return None if stat is None else int(stat[_START])


def lives(pid: int | None, start: int | None) -> bool:
    """Whether a process runs, and is the one that started then."""
    if pid is None or start is None:
        return False
    stat = _stat(pid)
    return stat is not None and int(stat[_START]) == start and stat[_STATE] not in ("Z", "X")


def _stat(pid: int) -> list[str] | None:
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def environment_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with."""
    entries = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    found = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in found}


def members(mark: str, leaders: Collection[tuple[int, int]]) -> list[int]:
    """All processes of an instance, or of a job: those that carry the mark, and the sessions of its leaders.

    `mark` is a whole mark, or its beginning up to and with the `/`. A leader is a process id with its start. A
    session whose number now belongs to a stranger is left alone: its leader's start tells.
    """
    carried = f"\0{MARK}={mark}".encode() + (b"" if mark.endswith("/") else b"\0")
    sessions = {pid for pid, start in leaders if start_of(pid) in (start, None)}
    return [pid for pid in _others() if _belongs(pid, carried, sessions)]


def _others() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal() and int(entry.name) != os.getpid()]


def _belongs(pid: int, carried: bytes, sessions: Collection[int]) -> bool:
    stat = _stat(pid)
    if stat is None or stat[_STATE] in ("Z", "X"):
        return False
    if int(stat[_SESSION]) in sessions:
        return True
    try:
        return carried in b"\0" + (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False


def send(pids: Collection[int], kind: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, kind)


def kill_all(find: Callable[[], list[int]], seconds: float = 5.0) -> list[int]:
    """Kill what `find` finds until it finds nothing more, at most so long; returns what is left.

    A process may start another just before it is killed, so one look is not enough.
    """
    deadline = time.monotonic() + seconds
    while (found := find()) and time.monotonic() < deadline:
        send(found, signal.SIGKILL)
        time.sleep(0.01)
    return found


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int, address: str) -> bool:
    """Whether one could listen on a port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True
