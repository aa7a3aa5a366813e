"""Devices and their limits: those of GPUs from their makers' data sheets, that of the CPU measured."""

import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hasten import ops
from hasten.core.errors import ConfigError
from hasten.core.option_fields import parse_size
from hasten.engine.memory import available_host_memory
from hasten.parallel.threads import limit_threads

_GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """What one device has."""

    name: str
    memory: int
    """Bytes, of which a program can have all."""
    bytes_per_second: float
    """Of reading memory, at most."""
    flops: float
    """Operations per second at most in dense products of fp16 or bf16, summed in fp32; on a CPU of fp32."""
    is_gpu: bool = True
    cache_bytes: int = 0
    """Of a CPU's last cache, from which a small model is read."""
    cached_bytes_per_second: float = 0.0
    """Of reading that cache, at most."""
    has_kernels: bool = False
    """Whether a CPU computes by kernels that numba compiles, not by torch's."""


_SHEET: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 178.0, 8.0, 2250),
    ("GH200", 94.5, 4.0, 989),
    ("H200", 139.8, 4.8, 989),
    ("H100 PCIe", 79.2, 2.0, 756),
    ("H100 NVL", 93.1, 3.9, 835),
    ("H100", 79.2, 3.35, 989),
    ("A100-40GB", 39.4, 1.555, 312),
    ("A100", 79.2, 2.039, 312),
    ("L40S", 44.4, 0.864, 362),
    ("L40", 44.4, 0.864, 181),
    ("L4", 22.0, 0.3, 121),
    ("A10G", 22.0, 0.6, 70),
    ("A10", 22.0, 0.6, 125),
    ("RTX 4090", 23.6, 1.008, 165),
    ("RTX 3090", 23.6, 0.936, 71),
)
"""Name, GiB, TB/s and TFLOP/s; the first name whose words are all in a driver's name is the device's."""
GPUS = tuple(name for name, *_ in _SHEET)


def gpu(name: str) -> Device:
    """A GPU of the table, by any spelling of its name; ConfigError names those that there are."""
    given = name.lower()
    for known, gib, terabytes, teraflops in _SHEET:
        words = re.split("[ -]", known.lower())
        if all(_has_word(given, word) for word in words) or given == words[-1]:
            return Device(known, round(gib * _GIB), terabytes * 1e12, teraflops * 1e12)
    raise ConfigError(f"gpu {name!r} is not known; use one of {', '.join(GPUS)}")


def _has_word(text: str, word: str) -> bool:
    """Whether a word is in a text, and not as the part of a longer number (h1000) or of a longer name (gh200)."""
    before, behind = ("[a-z]" if end.isalpha() else "[0-9]" for end in (word[0], word[-1]))
    return re.search(f"(?<!{before}){word}(?!{behind})", text) is not None


def this_gpu() -> Device | None:
    """The GPU of this machine with its real memory, if there is one; ConfigError where the table lacks it."""
    if not torch.cuda.is_available():
        return None
    found = gpu(torch.cuda.get_device_name())
    return Device(found.name, torch.cuda.mem_get_info()[1], found.bytes_per_second, found.flops)


_READ_BYTES, _CACHED_BYTES, _PRODUCT = 128 << 20, 4 << 20, 512
_MEASURE_S = 0.15
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SATURATING_THREADS = 8
"""About as many as read all that a socket's memory gives."""


def this_cpu() -> Device:
    """The CPU of this machine: what its threads read and multiply, measured in a moment, and the memory that is free.

    One thread is measured by its own CPU time, which other programs disturb less than the clock of all threads.
    """
    threads = limit_threads()
    torch.set_num_threads(1)
    try:
        values, square = _in_weights_memory(torch.ones(_READ_BYTES // 4)), torch.ones(_PRODUCT, _PRODUCT)
        few = values[: _CACHED_BYTES // 4]
        reading = _least_seconds(lambda: values.sum())
        reading_few = _least_seconds(lambda: few.sum())
        multiplying = _least_seconds(lambda: square @ square)
    finally:
        torch.set_num_threads(threads)
    return Device(
        name=f"CPU, {threads} thread{'s' * (threads != 1)}",
        memory=available_host_memory(),
        bytes_per_second=min(threads, _SATURATING_THREADS) * _READ_BYTES / reading,
        flops=threads * 2 * _PRODUCT**3 / multiplying,
        is_gpu=False,
        cache_bytes=_last_cache(),
        cached_bytes_per_second=threads * _CACHED_BYTES / reading_few,
        has_kernels=find_spec("numba") is not None,
    )


def _in_weights_memory(values: Tensor) -> Tensor:
    """Values in such memory as weights are in, which may be read faster than other memory."""
    moved = ops.relocated(values)
    assert isinstance(moved, Tensor)
    return moved


def _last_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 where the system does not say."""
    sizes = [0]
    for file in _CACHES.glob("index*/size"):
        with suppress(OSError, ConfigError):
            sizes.append(parse_size(file.read_text().strip()))
    return max(sizes)


def _least_seconds(work: Callable[[], object]) -> float:
    """Of all times that something is done within a moment, the shortest: other programs only make it longer."""
    least, end = math.inf, time.thread_time() + _MEASURE_S
    while (start := time.thread_time()) < end or math.isinf(least):
        work()
        least = min(least, time.thread_time() - start)
    return least
