"""The device: its default and types, its compiled and recorded kernels, and counts that devices wait for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.core.dtypes import CacheDType, DTypeName
from hasten.ops import native, reference

if TYPE_CHECKING:
    from hasten.ops.native.record import Recording

TORCH_DTYPES: dict[DTypeName, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""torch's types by the names of the configuration."""
CACHE_DTYPES: dict[CacheDType, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Types of 8 bits that the key/value cache may have, by the names of the configuration."""


def hidden_dtype(dtype: torch.dtype, device_kind: str) -> torch.dtype:
    """Type of hidden states, and of biases and the weights of norms, of a model that computes in `dtype`.

    `device_kind`: "cpu" or "cuda".
    On a CPU it is fp32 for bf16: kernels there compute in fp32, and would have to round each result and widen it again.
    """
    return torch.float32 if device_kind == "cpu" and dtype == torch.bfloat16 else dtype


def await_count(count: Tensor, number: int, abort_flag: Tensor) -> None:
    """Let what follows on this device wait until `count`, int32 [1], is at `number` or beyond it.

    It counts modulo 2^32. `abort_flag`, int32 [1] in memory of the host, ends the wait once it is not 0.
    """
    if count.is_cuda:
        from hasten.ops.gpu import signals

        return signals.await_count(count, number, abort_flag)
    return reference.await_count(count, number, abort_flag)


def set_count(count: Tensor, number: int) -> None:
    """Set a count that another device may wait for, behind all that this device has written."""
    if count.is_cuda:
        from hasten.ops.gpu import signals

        return signals.set_count(count, number)
    return reference.set_count(count, number)


def any_compiled() -> bool:
    """Whether this process has kernels for a GPU, compiled or read from the cache of kernels."""
    from hasten.ops.gpu import compiling

    return compiling.any_compiled()


def library_rows(most: int) -> list[int]:
    """Numbers of rows, one for each that a GPU's library is given for products of up to `most`, in ascending order.

    What it needs is loaded when the first of its kind is computed, and who computes it in a fixed order is found out
    then; see `gpu/library.py`.
    """
    from hasten.ops.gpu import library

    return library.row_counts(most)


def compiled_together(processes: int) -> AbstractContextManager[None]:
    """A block whose kernels for a GPU are compiled by several threads, and not launched; see `gpu/compiling.py`."""
    from hasten.ops.gpu import compiling

    return compiling.compiled_together(processes)


def compile_cpu_kernels(dtype: torch.dtype, *, quantized: bool, show_progress: bool) -> None:
    """Compile the kernels for a CPU, or read what an earlier start has compiled; nothing where numba is not installed.

    `dtype` and `quantized`: what a model computes in, and whether its weights have 8 or 4 bits. `show_progress` draws a
    bar while kernels are compiled, if standard error is a terminal.
    """
    if native.are_installed():
        from hasten.ops.native import compiled

        compiled.prepare("fp32", show_progress=show_progress)
        if dtype == torch.bfloat16:
            compiled.prepare("bf16", show_progress=show_progress)
        if quantized and compiled.multiplies_bytes():
            compiled.prepare("bytes", show_progress=show_progress)
        native.kernels()


def records() -> bool:
    """Whether kernels for a CPU are there, whose launches can be recorded."""
    return native.kernels() is not None


def kept_kernels() -> Path | None:
    """The folder that later starts read the kernels for a CPU from; None where there are none, or they are not kept."""
    if native.kernels() is None:
        return None
    from hasten.ops.native.compiled import are_kept, kernel_folder

    return kernel_folder() if are_kept() else None


@contextmanager
def recorded() -> Iterator["Recording"]:
    """A block whose kernels for a CPU run, and are recorded to be run again; see `native/record.py`."""
    kernels = native.kernels()
    assert kernels is not None
    with kernels.record.recorded() as recording:
        yield recording


def default_device() -> torch.device:
    """A GPU where there is one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
