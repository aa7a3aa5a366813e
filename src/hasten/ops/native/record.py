"""Launches that are recorded and run again: one call instead of hundreds, as a CUDA graph is on a GPU.

What is recorded reads the same memory each time, so its inputs are overwritten before. Memory between its kernels comes
from pieces that the recording keeps, each used again once no tensor is in it any more.
"""

import ctypes
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.ops.native import launch

_LINE = 64
"""Bytes of a cache line, with which each piece of memory begins."""


class Recording:
    """Kernels in the order in which they were launched."""

    def __init__(self) -> None:
        self.is_whole = True
        """Whether kernels alone computed what was computed: nothing else can be run again."""
        self._launches: list[tuple[int, bytes]] = []
        self._operations = 0
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._words: Any = None

    def add(self, kernel: int, arguments: bytes, operations: int) -> None:
        """Take a kernel, by its address, and its packed arguments."""
        self._launches.append((kernel, arguments))
        self._operations += operations

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory in fp32 for the result of a kernel."""
        size = max(1, math.prod(shape))
        free = self._free.setdefault(size, [])
        piece = free.pop() if free else _aligned(size)
        held = piece[: math.prod(shape)]  # lives as long as any tensor in the memory
        weakref.finalize(held, free.append, piece)
        return torch.from_numpy(held).view(shape)

    def finish(self) -> None:
        """Lay the launches out for `run`."""
        arguments = [each for _, each in self._launches]
        offsets = np.cumsum([0, *map(len, arguments)]) + launch.HEAD + launch.ENTRY.size * len(arguments)
        self._words = ctypes.create_string_buffer(int(offsets[-1]))
        base = ctypes.addressof(self._words)
        entries = [
            launch.ENTRY.pack(kernel, base + int(offset))
            for (kernel, _), offset in zip(self._launches, offsets, strict=False)
        ]
        self._words.raw = b"".join([launch.head(len(arguments)), *entries, *arguments])

    def run(self) -> None:
        """Run all kernels again."""
        launch.run(ctypes.addressof(self._words), self._operations)


def _aligned(size: int) -> "np.ndarray[Any, Any]":
    whole = np.empty(4 * size + _LINE, dtype=np.uint8)
    first = -whole.ctypes.data % _LINE
    return whole[first : first + 4 * size].view(np.float32)


def _storage(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None for oneDNN's own layouts."""
    return None if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class _Watch(TorchDispatchMode):
    """Notes whether torch computes anything itself, other than views."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and saying so would import torch's compiler, for a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Whatever torch is called for."""
        result = func(*args, **(kwargs or {}))
        given = {_storage(each) for each in args if isinstance(each, Tensor)} - {None}
        results = result if isinstance(result, list | tuple) else [result]
        are_views = all(isinstance(each, Tensor) and _storage(each) in given for each in results)
        if func._schema.is_mutable or not are_views:
            self._recording.is_whole = False
        return result


@contextmanager
def recorded() -> Iterator[Recording]:
    """A block whose kernels run and are recorded."""
    recording = Recording()
    launch.recordings.current = recording
    try:
        with _Watch(recording):
            yield recording
    finally:
        launch.recordings.current = None
    recording.finish()
