"""What all kernels share: how they are launched one behind another.

Where the device can (compute capability 9.0 and up), a kernel starts while the ones before it still run (programmatic
dependent launch). Until `wait_for_inputs` it may read only what no kernel of this step writes: weights, and the numbers
that the host sent. That is enough to keep memory busy while short kernels take their turns. Every program with work
waits, and one of every kernel at least, so that each kernel sees the work of all before it. Behind a kernel that calls
`start_next` after its own wait, the next one may also read what kernels before both of them wrote.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel start, once every program of this one has said so."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until all earlier kernels are done and their results can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(pointers):
    """Ask for the lines at these pointers to be brought to the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@cache
def _overlaps(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def overlapped(tensor: Tensor) -> dict[str, Any]:
    """Launch options for a kernel on this tensor's device."""
    pdl = tensor.is_cuda and _overlaps(tensor.device.index)
    return {"PDL": pdl, "launch_pdl": pdl} if tensor.is_cuda else {"PDL": False}


@cache
def has_warp_groups(index: int | None) -> bool:
    """Whether four warps of a device multiply 64 rows together, each 16 of them, as on an H200."""
    return index is None or torch.cuda.get_device_capability(index)[0] == 9


@cache
def multiprocessors(index: int | None) -> int:
    """Multiprocessors of a device; as many as an H200 has where there is none."""
    return 132 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


@cache
def shared_memory(index: int | None) -> int:
    """Bytes of shared memory that one program may take; as many as on an H200 where there is no device."""
    if index is None:
        return 227 << 10
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["max_shared_mem"]


def row_warps(width: int) -> int:
    """Warps of a program that computes a row: eight elements a thread at a time, up to 16 warps."""
    return max(1, min(16, triton.next_power_of_2(width) // 256))
