"""How many CPUs this process may use: the single place that counts them, for whatever starts threads."""

import os
from pathlib import Path

from hasten.core.cgroups import OWN, SYSTEM, own_groups, words


def available_cpus(system: Path = SYSTEM, own: Path = OWN) -> int:
    """CPUs of this process's affinity, or as many as its container's quota lasts for, rounded up, if that is fewer."""
    # not every system has an affinity
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (quota for folder in own_groups("cpu", system, own) if (quota := _quota(folder)) is not None)
    return max(1, min((allowed, *quotas)))


def _quota(folder: Path) -> int | None:
    """CPUs that the quota of one group lasts for: of version 2 in one file, of version 1 in two."""
    found = words(folder / "cpu.max")
    if not found:
        found = [*words(folder / "cpu.cfs_quota_us"), *words(folder / "cpu.cfs_period_us")]
    if len(found) != 2 or not all(word.isdecimal() for word in found) or int(found[1]) == 0:
        return None  # none is set: `max`, or -1
    return -(-int(found[0]) // int(found[1]))
