"""How much memory the cache may take."""

from pathlib import Path

import torch

from hasten.core.errors import CapacityError

_CPU_SHARE = 0.25
"""Part of the free memory of a host that caches take by default: the system lends it page by page, as it is used."""


def free_memory(device: torch.device, utilization: float, ranks: int) -> int:
    """Bytes that the cache of one of `ranks` ranks on this host may take by default.

    On a GPU: what the engine may use of all its memory (`utilization`), less what is in use already.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(total * (1 - utilization)))
    return int(available_host_memory() * _CPU_SHARE) // ranks


def available_host_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process on this host, or in this container, can still get without swapping."""
    try:
        fields = dict(line.split(":", 1) for line in proc.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError) as error:
        raise CapacityError(f"cannot tell how much memory is free ({error}); set kv_cache_memory") from error
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(used.read_text()))
    return max(0, available)
