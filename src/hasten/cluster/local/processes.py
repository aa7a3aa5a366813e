"""Processes of this machine, as Linux's /proc tells: which one a record means, and all that belong to an instance."""

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MARK = "HASTEN_INSTANCE"
"""Variable in the environment of an instance and of all that it starts: the job's uid, `/`, the instance's name."""

_PROC = Path("/proc")
_STATE, _PARENT, _SESSION, _START = 0, 1, 3, 19
"""Positions in /proc/PID/stat, after the name."""
_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


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
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def environment_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with."""
    entries = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    found = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in found}


def adopt_orphans() -> None:
    """Make this process, and the program that it becomes, the parent of descendants whose own parent ends.

    Without that init would be: nothing would then show whose they are (PR_SET_CHILD_SUBREAPER, since Linux 3.4).
    """
    _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def members(mark: str, leaders: Collection[tuple[int, int]]) -> list[int]:
    """All processes of an instance, or of a job: those that carry the mark or are in a leader's session, the leaders,
    and the descendants of all of these.

    `mark` is a whole mark, or its beginning up to and with the `/`. A leader is a process id with its start. A
    session whose number now belongs to a stranger is left alone: its leader's start tells. A record may not name its
    leaders yet, so marked processes lead to their descendants as leaders do.
    """
    carried = f"\0{MARK}={mark}".encode() + (b"" if mark.endswith("/") else b"\0")
    sessions = {pid for pid, start in leaders if start_of(pid) in (start, None)}
    stats = _stats()
    roots = {pid for pid, stat in stats.items() if _belongs(pid, stat, carried, sessions)}
    roots |= {pid for pid, start in leaders if pid in stats and start_of(pid) == start}
    return [*(roots | _descendants(roots, stats))]


def orphans(known: Collection[int]) -> list[int]:
    """Processes that this one adopted, with their descendants: its children other than those that are known."""
    stats = _stats()
    adopted = {pid for pid, stat in stats.items() if int(stat[_PARENT]) == os.getpid() and pid not in known}
    return [*adopted, *_descendants(adopted, stats)]


def reap_orphans(known: Collection[int]) -> None:
    """Let adopted processes that have ended go. The known ones are waited for by those who started them."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in known:
            os.waitpid(ended.si_pid, os.WNOHANG)


def _stats() -> dict[int, list[str]]:
    """What /proc tells of all processes that have not ended, but this one."""
    pids = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal())
    found = {pid: stat for pid in pids if pid != os.getpid() and (stat := _stat(pid)) is not None}
    return {pid: stat for pid, stat in found.items() if stat[_STATE] not in ("Z", "X")}


def _descendants(roots: Collection[int], stats: Mapping[int, Sequence[str]]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(int(stat[_PARENT]), []).append(pid)
    found: set[int] = set()
    left = list(roots)
    while left:
        new = [pid for pid in children.get(left.pop(), ()) if pid not in found]
        found.update(new)
        left += new
    return found


def _belongs(pid: int, stat: Sequence[str], carried: bytes, sessions: Collection[int]) -> bool:
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

    A process may start another just before it is killed, so one look is not enough. A killed process takes a moment to
    end, in which `find` may miss it: once its parent has ended, nothing shows whose descendant it is.
    """
    deadline = time.monotonic() + seconds
    killed: dict[int, int | None] = {}
    while True:
        left = {*find(), *(pid for pid, start in killed.items() if lives(pid, start))}
        if not left or time.monotonic() > deadline:
            return sorted(left)
        killed |= {pid: start_of(pid) for pid in left}
        send(left, signal.SIGKILL)
        time.sleep(0.01)
