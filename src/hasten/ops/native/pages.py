"""Memory for what a CPU reads from beginning to end at each step: its weights.

It comes in pages of 2 MiB where Linux has them for whoever asks. A processor fetches ahead no further than to the end
of a page, and looks up the address of each: from pages of 4 KiB a core reads a third more slowly
(docs/performance-log.md).
"""

import math
import mmap
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PAGE = 1 << 21
"""Bytes of a large page."""
_REGION = 1 << 26
"""Bytes that the system is asked for at a time; what is never written takes no memory."""
_MOST_FREE = 1 << 25
"""Numbers of results that are kept for others."""
_LINE = 64
"""Bytes of a cache line, with which each tensor begins."""


class _Regions:
    """Memory of the system, given out from the beginning of a region to its end.

    A region goes back once no tensor is in it any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region = np.empty(0, np.uint8)
        self._used = 0

    def take(self, size: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """So many bytes, all 0."""
        with self._lock:
            if self._used + size > len(self._region):
                self._region, self._used = _region(max(size, _REGION)), 0
            taken = self._region[self._used : self._used + size]
            self._used += -(-size // _LINE) * _LINE
        return taken


def _region(size: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Memory that begins with a large page."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % _PAGE
    return whole[first : first + size]


_regions = _Regions()


class _Reused:
    """Large pieces of memory, each kept for other results once no tensor is in it any more.

    The system would take them back each time and give them out again page by page, which takes up to as long as
    computing what is in them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[np.ndarray[Any, Any]] = []

    def take(self, count: int) -> "np.ndarray[Any, Any]":
        """So many numbers in fp32, with whatever content."""
        with self._lock:  # pieces that become free meanwhile only follow the others
            fitting = [n for n, piece in enumerate(self._free) if count <= len(piece) <= 2 * count]
            smallest = min(fitting, key=lambda number: len(self._free[number]), default=None)
            piece = None if smallest is None else self._free.pop(smallest)
            while sum(map(len, self._free)) > _MOST_FREE:
                self._free.pop(0)
        if piece is None:
            piece = _region(4 * count + -4 * count % _PAGE).view(np.float32)
        held = piece[:count]  # lives as long as any tensor in the memory
        weakref.finalize(held, self._free.append, piece)
        return held


_reused = _Reused()


def reused(shape: tuple[int, ...]) -> Tensor:
    """A tensor in fp32 with whatever content, in memory that others had before."""
    return torch.from_numpy(_reused.take(math.prod(shape))).view(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of zeros in large pages, as far as there are any."""
    return torch.from_numpy(_regions.take(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor in large pages."""
    return zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)
