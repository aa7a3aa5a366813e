"""Sums over the GPUs of one host through each other's memory, with the norm that follows.

A rank writes its part of a row to all others and waits for theirs. There is no other signal: each 64-bit word carries
two 16-bit values and the number of the exchange, and such a word is written as one. Two places a row take turns: a rank
may be one exchange ahead of another, never two, since it waits for the other's words. Should a rank die, the host says
so in memory of its own, which the others look at when they have waited for long. Every rank adds the parts up in the
order of ranks, so all hold the same bits. Where a row's bits may not depend on other rows either, all numbers of rows
take this way: NCCL adds in another order, and the plain norm adds up a row in another one. A row that has a mailbox of
its own, and one that waits for its turn, are computed by the same lines, whose sums the compiler lays out alike.

Shapes: t tokens, h hidden.
"""

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.gpu.library import with_room
from hasten.ops.gpu.sums import constants_of, terms_of
from hasten.ops.partial_sum import PartialSum
from hasten.ops.peers import Peers

POLLS_PER_ABORT_CHECK = tl.constexpr(4096)
"""Polls of the mailbox, some milliseconds, between two reads of the host's abort flag."""
_MOST_WARPS, _WIDE = 16, 8192
"""Of a row; twice as many where it is wider than that, so that each thread's values fit into its registers."""
_MOST_TURNING_WIDTH, _TURNING_REGISTERS = 4096, 64
"""Where rows take turns, a thread has so few registers that a multiprocessor has two programs, one of which computes
while the other waits. Wider rows have more than eight values a thread, for which that would not be enough."""


@triton.jit
def _pair(low, high):
    """Two 16-bit values as the lower half of a 64-bit word."""
    low = low.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    high = high.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return low | (high << 16)


@triton.jit
def _added_up(total_h, parts, part_stride, at_h, valid_h, PARTS: tl.constexpr):
    """`total_h` and the parts of a row, in their order."""
    for part in tl.static_range(PARTS):
        total_h += tl.load(parts + part * part_stride + at_h, valid_h, 0.0).to(tl.float32)
    return total_h


@triton.jit
def _exchange_row(
    row,
    slot,
    number,
    parts,
    part_stride,
    bias_h,
    added,
    added_stride,
    added_bias_h,
    residual,
    residual_rows,
    total_out,
    gain_h,
    shift_h,
    out,
    addresses,
    mailbox,
    abort_flag,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    RMS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """One row, by the words of a slot of the mailbox in the exchange of a number."""
    h = tl.arange(0, 2 * PAIRS)
    pair = tl.arange(0, PAIRS)
    valid_h = h < H
    valid = pair < H // 2
    at_h = row * H + h
    dtype: tl.constexpr = out.dtype.element_ty
    # what is added behind the other ranks' words is fetched before they are waited for
    from_row = tl.load(residual_rows + row).to(tl.int64) if HAS_ROWS else row
    residual_h = tl.load(residual + from_row * H + h, valid_h, 0.0) if HAS_RESIDUAL else None
    own_h = _added_up(tl.zeros([2 * PAIRS], tl.float32), parts, part_stride, at_h, valid_h, PARTS)
    own_h = _added_up(own_h, added, added_stride, at_h, valid_h, ADDED).to(dtype)
    low, high = tl.split(own_h.reshape([PAIRS, 2]))
    mine = _pair(low, high) | (number.to(tl.int64) << 32)
    offset = (((number & 1).to(tl.int64) * MAX_ROWS + slot) * RANKS) * (H // 2) + pair
    for other in tl.static_range(RANKS):
        if other != RANK:
            theirs = tl.load(addresses + other).to(tl.pointer_type(tl.int64))
            tl.store(theirs + offset + RANK * (H // 2), mine, valid)
    low = tl.zeros([PAIRS], tl.float32)
    high = tl.zeros([PAIRS], tl.float32)
    for other in tl.static_range(RANKS):
        word = mine
        if other != RANK:
            at = mailbox + offset + other * (H // 2)
            word = tl.load(at, valid, 0, volatile=True)
            polls, over = 0, 0
            while (over == 0) & (tl.max((valid & ((word >> 32) != number)).to(tl.int32), 0) != 0):
                word = tl.load(at, valid, 0, volatile=True)
                polls += 1
                if polls % POLLS_PER_ABORT_CHECK == 0:
                    over = tl.load(abort_flag, volatile=True)
        low += (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high += ((word >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    total_h = tl.join(low, high).reshape([2 * PAIRS])
    if bias_h is not None:
        total_h += bias_h.to(tl.float32)
    if added_bias_h is not None:
        total_h += added_bias_h.to(tl.float32)
    if residual_h is not None:
        total_h += residual_h.to(tl.float32)
    rounded_h = total_h.to(dtype)
    tl.store(total_out + at_h, rounded_h, valid_h)
    centred_h = rounded_h.to(tl.float32)
    if not RMS:
        centred_h = tl.where(valid_h, centred_h - tl.sum(centred_h, 0) / H, 0.0)
    scale = tl.rsqrt(tl.sum(centred_h * centred_h, 0) / H + eps)
    gain_h = gain_h.to(tl.float32)
    if OFFSET:
        gain_h += 1.0
    normed_h = centred_h * scale * gain_h
    if shift_h is not None:
        normed_h += shift_h.to(tl.float32)
    tl.store(out + at_h, normed_h.to(dtype), valid_h)


@triton.jit(do_not_specialize=["rows", "part_stride", "added_stride"])
def _exchange_norm(
    parts,
    part_stride,
    bias,
    added,
    added_stride,
    added_bias,
    residual,
    residual_rows,
    total_out,
    weight,
    norm_bias,
    out,
    addresses,
    mailbox,
    exchanges,
    abort_flag,
    rows,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ANY_ROWS: tl.constexpr,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDED_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RMS: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up all ranks' parts of a row, biases and residual; store the sum and its norm.

    With ANY_ROWS a program goes on with every row that is MAX_ROWS further: they take turns in its slot.
    """
    start_next(PDL)
    slot = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, 2 * PAIRS)
    gain_h = tl.load(weight + h, h < H, 0.0)
    shift_h = tl.load(norm_bias + h, h < H, 0.0) if HAS_SHIFT else None
    bias_h = tl.load(bias + h, h < H, 0.0) if HAS_BIAS else None
    added_bias_h = tl.load(added_bias + h, h < H, 0.0) if HAS_ADDED_BIAS else None
    # rows lie one behind another: what that says of the stride lets several values be fetched at once
    part_stride = part_stride // H * H
    added_stride = added_stride // H * H
    wait_for_inputs(PDL)
    number = tl.load(exchanges + slot)
    if ANY_ROWS:
        row = slot
        while row < rows:
            number += 1
            _exchange_row(
                row, slot, number, parts, part_stride, bias_h, added, added_stride, added_bias_h, residual,
                residual_rows, total_out, gain_h, shift_h, out, addresses, mailbox, abort_flag, eps, RANK, RANKS,
                MAX_ROWS, H, PAIRS, PARTS, ADDED, HAS_RESIDUAL, HAS_ROWS, RMS, OFFSET,
            )  # fmt: skip
            row += MAX_ROWS
    else:
        number += 1
        _exchange_row(
            slot, slot, number, parts, part_stride, bias_h, added, added_stride, added_bias_h, residual,
            residual_rows, total_out, gain_h, shift_h, out, addresses, mailbox, abort_flag, eps, RANK, RANKS,
            MAX_ROWS, H, PAIRS, PARTS, ADDED, HAS_RESIDUAL, HAS_ROWS, RMS, OFFSET,
        )  # fmt: skip
    tl.store(exchanges + slot, number)  # last: every warp of this program has read it by then


def _warps(width: int) -> int:
    most = _MOST_WARPS if width <= _WIDE else 2 * _MOST_WARPS
    return max(1, min(most, triton.next_power_of_2(width) // 256))


def _registers(turns: bool, weight_h: Tensor) -> dict[str, int]:
    few = turns and weight_h.is_cuda and len(weight_h) <= _MOST_TURNING_WIDTH
    return {"maxnreg": _TURNING_REGISTERS} if few else {}


def exchange_norm(
    sum_: PartialSum,
    peers: Peers,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm of a sum over ranks, and the sum: see `hasten.ops.norm`."""
    rows, width = sum_.shape
    assert peers.takes(rows)
    assert width == peers.width
    turns = rows > peers.max_rows
    out_th = with_room(weight_h, rows, width)
    total_th = weight_h.new_empty(rows, width)
    _exchange_norm[(min(rows, peers.max_rows),)](
        *terms_of(sum_, weight_h),
        total_th,
        weight_h,
        weight_h if bias_h is None else bias_h,
        out_th,
        peers.addresses,
        peers.mailbox,
        peers.exchanges,
        peers.abort_flag,
        rows,
        eps,
        RANK=peers.rank,
        RANKS=peers.size,
        MAX_ROWS=peers.max_rows,
        ANY_ROWS=turns,
        H=width,
        PAIRS=triton.next_power_of_2(width) // 2,
        **constants_of(sum_),
        HAS_SHIFT=bias_h is not None,
        RMS=rms,
        OFFSET=unit_offset,
        num_warps=_warps(width),
        **_registers(turns, weight_h),
        **overlapped(weight_h),
    )
    return out_th, total_th
