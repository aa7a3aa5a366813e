"""Counts in memory that the GPUs of one host write for each other: what one waits for before it reads, or writes, more.

A count wraps from 2^31 - 1 to -2^31, so that it may grow for as long as a server runs.
"""

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.exchange import POLLS_PER_ABORT_CHECK
from hasten.ops.peers import wrapped


@triton.jit(do_not_specialize=["number"])
def _await_count(count, number, abort_flag, POLLS: tl.constexpr):
    """Poll until the count is at `number` or beyond it, and look at the flag once in `POLLS`."""
    missing = number - tl.load(count, volatile=True)
    polls, over = 0, 0
    while (over == 0) & (missing > 0):
        missing = number - tl.load(count, volatile=True)
        polls += 1
        if polls % POLLS == 0:
            over = tl.load(abort_flag, volatile=True)


@triton.jit(do_not_specialize=["address", "number"])
def _set_count(address, number):
    """Write the count at an address, behind whatever this device wrote before."""
    tl.store(address.to(tl.pointer_type(tl.int32)), number)


def await_count(count: Tensor, number: int, abort_flag: Tensor) -> None:
    _await_count[(1,)](count, wrapped(number), abort_flag, POLLS=POLLS_PER_ABORT_CHECK.value, num_warps=1)


def set_count(count: Tensor, number: int) -> None:
    # by its address, as memory of another GPU, which a launcher of Triton need not know
    _set_count[(1,)](count.data_ptr(), wrapped(number), num_warps=1)
