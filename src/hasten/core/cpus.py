"""How many CPUs this process may use: the single place that counts them, for whatever starts threads."""

import os
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_cpus(system: Path = _SYSTEM, own: Path = _OWN) -> int:
    """CPUs of this process's affinity, or as many as its container's quota lasts for, rounded up, if that is fewer."""
    # not every system has an affinity
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (quota for folder in _folders(system, own) if (quota := _quota(folder)) is not None)
    return max(1, min((allowed, *quotas)))


def _folders(system: Path, own: Path) -> Iterator[Path]:
    """The control groups of this process that may limit its CPU time, each with those that it lies in.

    A container may see its own group as the root, whatever path the system names.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mounted in (system / controllers, *(system / name for name in controllers.split(","))):
            group = mounted / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mounted))


def _quota(folder: Path) -> int | None:
    """CPUs that the quota of one group lasts for: of version 2 in one file, of version 1 in two."""
    words = _words(folder / "cpu.max")
    if not words:
        words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None  # none is set: `max`, or -1
    return -(-int(words[0]) // int(words[1]))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
