"""What the machine has: its processors and memory, its GPUs where NVIDIA's library can be asked, and descriptors."""

import asyncio
import errno
import logging
import os
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

_LOG_EVERY_S, _LOOK_EVERY_S = 60.0, 0.25
_log = logging.getLogger(__name__)

_IDLE = (3, 4)
"""Columns of /proc/stat in which a processor does nothing: idle and iowait."""


class CpuMeter:
    """Reads /proc; where there is none, all is 0."""

    def __init__(self) -> None:
        self._before = _ticks()

    def read(self) -> Mapping[str, float]:
        """By the names of metrics, what has been since the last reading; memory in bytes."""
        now = _ticks()
        idle, total = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        memory = _memory()
        total_memory = memory.get("MemTotal", 0)
        return {
            "nv_cpu_utilization": 1 - idle / total if total > 0 else 0.0,
            "nv_cpu_memory_total_bytes": total_memory,
            "nv_cpu_memory_used_bytes": total_memory - memory.get("MemAvailable", total_memory),
        }


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="ascii")
    except OSError:
        return ""


def _ticks() -> tuple[int, int]:
    """Ticks that processors were idle, and all."""
    columns = [int(column) for column in _read("/proc/stat").partition("\n")[0].split()[1:9]]
    return sum(columns[at] for at in _IDLE if at < len(columns)), sum(columns)


def _memory() -> dict[str, int]:
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 2}


class GpuMeter:
    """Reads the GPUs through the package pynvml; without it or without GPUs there is nothing to read."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._begun: dict[str, float] = {}
        try:
            self._nvml = import_module("pynvml")
            self._nvml.nvmlInit()
        except Exception:  # the package, the driver or the GPUs are not there: no two versions say so alike
            self._nvml = None

    def _handles(self) -> list[Any]:
        if self._nvml is None:
            return []
        return [self._nvml.nvmlDeviceGetHandleByIndex(at) for at in range(self._nvml.nvmlDeviceGetCount())]

    def names(self) -> list[str]:
        """What the GPUs are called."""
        return [str(self._nvml.nvmlDeviceGetName(handle)) for handle in self._handles()]

    def read(self) -> Mapping[str, Mapping[str, float]]:
        """By each GPU's UUID and the names of metrics: a utilization, bytes, watts, joules since the first reading."""
        return {str(self._nvml.nvmlDeviceGetUUID(handle)): self._values(handle) for handle in self._handles()}

    def _values(self, handle: Any) -> dict[str, float]:
        nvml = self._nvml
        readers: dict[str, Callable[[], float]] = {
            "nv_gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "nv_gpu_memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "nv_gpu_memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "nv_gpu_power_usage": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "nv_gpu_power_limit": lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
            "nv_energy_consumption": lambda: self._energy(handle),
        }
        values: dict[str, float] = {}
        for name, reader in readers.items():
            try:
                values[name] = reader()
            except nvml.NVMLError:  # not every GPU tells everything
                continue
        return values

    def _energy(self, handle: Any) -> float:
        joules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        return float(joules - self._begun.setdefault(str(self._nvml.nvmlDeviceGetUUID(handle)), joules))


def raise_descriptor_limit() -> int:
    """Let this process have as many file descriptors as the system grants it; returns their number."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # where the system's own limit is below
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


async def watch_descriptors(limit: int) -> None:
    """Warn, at most once a minute, while no file descriptor is left; runs until it is cancelled.

    What accepts connections then closes them, and says nothing of it.
    """
    clock = asyncio.get_running_loop().time
    logged = clock() - _LOG_EVERY_S
    while True:
        if clock() - logged >= _LOG_EVERY_S and not _has_descriptors():
            _log.warning(
                "all %d file descriptors are in use, and new connections are closed without an answer; raise the limit "
                "(`ulimit -n`, LimitNOFILE=) or lower --http-max-connections",
                limit,
            )
            logged = clock()
        await asyncio.sleep(_LOOK_EVERY_S)


def _has_descriptors() -> bool:
    try:
        os.close(os.dup(0))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True
