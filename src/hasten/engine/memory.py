"""How much memory the cache may take, and the errors of a device that has run out of memory."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hasten.core import cgroups
from hasten.core.errors import CapacityError

_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a control group, by version: limit and use, and what of that the system gives back before it refuses memory."""
DEFAULT_MODEL_LEN = 2048
"""Longest sequence, where neither options nor the model say how long one may be."""
DEFAULT_STEP_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Maximum tokens of a step: enough to keep the device busy."""
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""In the message of torch's error."""
CPU_SHARE = 0.25
"""Part of the free memory of a host that caches take by default: the system lends it page by page, as it is used."""


def free_memory(device: torch.device, utilization: float, ranks: int) -> int:
    """Bytes that the cache of one of `ranks` ranks on this host may take by default.

    On a GPU: what the engine may use of all its memory (`utilization`), less what is in use already.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(total * (1 - utilization)))
    return int(available_host_memory() * CPU_SHARE) // ranks


def available_host_memory(
    meminfo: Path = Path("/proc/meminfo"), system: Path = cgroups.SYSTEM, own: Path = cgroups.OWN
) -> int:
    """Bytes that a process on this host, or in this container, can still get without swapping."""
    try:
        available = _meminfo(meminfo, "MemAvailable")
    except (OSError, KeyError, ValueError) as error:
        raise CapacityError(f"cannot find out how much memory is free ({error}); set kv_cache_memory") from error
    left = (free for folder in cgroups.own_groups("memory", system, own) if (free := _left(folder)) is not None)
    return max(0, min((available, *left)))


def host_memory_and_swap(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that a process on this host, or in this container, can still get; infinity where the system says nothing.

    The system lends more than that, and kills the process that uses it.
    """
    try:
        return available_host_memory(meminfo) + _meminfo(meminfo, "SwapFree")
    except (CapacityError, OSError, KeyError, ValueError):
        return math.inf


def _meminfo(file: Path, field: str) -> int:
    """Bytes of a field of /proc/meminfo."""
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def _left(folder: Path) -> int | None:
    """Bytes that a group may still take, files that are only cached counted as free; None where it has no limit."""
    for limit, used, cached in _FILES:
        most, taken = cgroups.number(folder / limit), cgroups.number(folder / used)
        if most is not None and taken is not None:
            found = cgroups.words(folder / "memory.stat")
            stat = dict(zip(found[::2], found[1::2], strict=False))
            return most - max(0, taken - int(stat.get(cached, 0)))
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no memory left: of a CPU's, torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_OUT_OF_MEMORY in str(error)


@contextmanager
def explained_out_of_memory(doing: str = "computing a step", advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn the device's running out of memory into a CapacityError that says what to lower, with further `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        more = "" if advice is None else advice()
        raise CapacityError(
            f"the device's memory ran out while {doing}; lower max_num_batched_tokens, max_num_seqs, "
            f"kv_cache_memory or gpu_memory_utilization, or use more ranks ({str(error).partition(chr(10))[0]}){more}"
        ) from error
