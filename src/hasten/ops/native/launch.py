"""How kernels that numba compiled for this processor are launched, on torch's own threads.

A kernel is a function of the address of its arguments, the number of its thread and how many threads there are; it does
its thread's part of the work. Arguments are whole numbers and addresses of 8 bytes, and floating-point numbers in fp64.
"""

import ctypes
import math
import struct
import threading
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.ops.native import pages
from hasten.ops.native.compiled import Kind, addresses

if TYPE_CHECKING:
    from hasten.ops.native.record import Recording

FEW_OPERATIONS = 1 << 17
"""Work below which one thread is done before others have begun, in products of two numbers or the like: some 5 µs."""
_LARGE = 1 << 20
"""Numbers of a result whose memory is used again."""
_WORDS = 64
"""Most words of 8 bytes that a launch takes."""


class Kernel:
    """A compiled kernel and the form of its arguments."""

    def __init__(self, name: str, arguments: str, kind: Kind = "fp32") -> None:
        """`arguments`: a letter each, `q` for whole numbers and addresses, `d` for floating-point numbers."""
        self._name, self._kind = name, kind
        self.arguments = struct.Struct(f"=2q{arguments}")
        """What a launch has of it: its address, that of its arguments, and these."""

    @cached_property
    def address(self) -> int:
        """Of its machine code; kernels of its kind are compiled where that has not been done."""
        return addresses(self._kind)[self._name]


HEAD = 48
"""Bytes that a launch begins with: the functions that number threads, count them and let them wait for each other, and
the number of kernels."""
ENTRY = struct.Struct("=2q")
"""Each kernel of a launch: its address, and that of its arguments."""


class _Memory(threading.local):
    """What one thread launches single kernels from."""

    def __init__(self) -> None:
        self.words = (ctypes.c_int64 * _WORDS).from_buffer_copy(head(1).ljust(8 * _WORDS, b"\0"))
        self.address = ctypes.addressof(self.words)
        self.arguments = self.address + HEAD + ENTRY.size


class _Threads:
    """The OpenMP library that torch computes with."""

    def __init__(self) -> None:
        """Without such a library, kernels run on the thread that launches them."""
        self.parallel: Any = None
        self.functions = [0, 0, 0]
        maps = Path("/proc/self/maps")
        found = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line} if maps.exists() else ()
        for path in sorted(path for path in found if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))):
            library = ctypes.CDLL(path)
            with suppress(AttributeError):
                used = (library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier)
                self.functions = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in used]
                self.parallel = library.GOMP_parallel
                self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                self.parallel.restype = None
                return


_threads = _Threads()


def head(count: int) -> bytes:
    """Header of a launch of this number of kernels."""
    return struct.pack("=6q", *_threads.functions, count, 0, 0)


_run_team = addresses("fp32")["team"]
_run_alone = ctypes.CFUNCTYPE(None, ctypes.c_int64)(addresses("fp32")["alone"])
_memory = _Memory()


class _Recordings(threading.local):
    """What launches of this thread are recorded in."""

    current: "Recording | None" = None


recordings = _Recordings()


def run(address: int, operations: int) -> None:
    """Run the kernels of a launch at an address, on this thread alone where their `operations` are few."""
    threads = 1 if operations < FEW_OPERATIONS or _threads.parallel is None else torch.get_num_threads()
    if threads == 1:
        _run_alone(address)
    else:
        _threads.parallel(_run_team, address, threads, 0)


def launch(kernel: Kernel, operations: int, *arguments: int | float | Tensor | None) -> None:
    """Run a kernel to its end, on as many threads as torch has, or on this one where `operations` are few.

    A tensor is passed as its address, and None as 0.
    """
    memory, recording = _memory, recordings.current
    numbers = [each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in arguments]
    kernel.arguments.pack_into(memory.words, HEAD, kernel.address, memory.arguments, *numbers)
    if recording is not None:
        recording.add(kernel.address, kernel.arguments.pack(0, 0, *numbers)[ENTRY.size :], operations)
    run(memory.address, operations)


def empty(*shape: int) -> Tensor:
    """Memory for the result of a kernel, in fp32."""
    recording = recordings.current
    if recording is not None:
        return recording.empty(shape)
    return torch.empty(shape) if math.prod(shape) < _LARGE else pages.reused(shape)
