"""Sums over the GPUs of one host through each other's memory, with the norm that follows.

A rank writes its part of a row to all others and waits for theirs. There is no other signal: each 64-bit word carries
two 16-bit values and the number of the exchange, and such a word is written as one. Two places a row take turns: a rank
may be one exchange ahead of another, never two, since it waits for the other's words. Should a rank die, the host says
so in memory of its own, which the others look at when they have waited for long. Every rank adds the parts up in the
order of ranks, so all hold the same bits. Where a row's bits may not depend on other rows either, all numbers of rows
take this way: NCCL adds in another order, and the plain norm adds up a row in another one.

Shapes: t tokens, h hidden; the program of a row keeps even and odd elements apart, as the words pair them.
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


@triton.jit
def _pair(low, high):
    """Two 16-bit values as the lower half of a 64-bit word."""
    low = low.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    high = high.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return low | (high << 16)


@triton.jit
def _exchange_row(
    row,
    slot,
    number,
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
    abort_flag,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
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
):
    """One row, by the words of a slot of the mailbox in the exchange of a number."""
    pair = tl.arange(0, PAIRS)
    valid = pair < H // 2
    even = pair * 2
    odd = even + 1
    dtype: tl.constexpr = out.dtype.element_ty
    low = tl.zeros([PAIRS], tl.float32)
    high = tl.zeros([PAIRS], tl.float32)
    for part in tl.static_range(PARTS):
        low += tl.load(parts + part * part_stride + row * H + even, valid, 0.0).to(tl.float32)
        high += tl.load(parts + part * part_stride + row * H + odd, valid, 0.0).to(tl.float32)
    for part in tl.static_range(ADDED):
        low += tl.load(added + part * added_stride + row * H + even, valid, 0.0).to(tl.float32)
        high += tl.load(added + part * added_stride + row * H + odd, valid, 0.0).to(tl.float32)
    mine = _pair(low.to(dtype), high.to(dtype)) | (number.to(tl.int64) << 32)
    place = (((number & 1).to(tl.int64) * MAX_ROWS + slot) * RANKS) * (H // 2) + pair
    for other in tl.static_range(RANKS):
        if other != RANK:
            theirs = tl.load(addresses + other).to(tl.pointer_type(tl.int64))
            tl.store(theirs + place + RANK * (H // 2), mine, valid)
    low = tl.zeros([PAIRS], tl.float32)
    high = tl.zeros([PAIRS], tl.float32)
    for other in tl.static_range(RANKS):
        word = mine
        if other != RANK:
            at = mailbox + place + other * (H // 2)
            word = tl.load(at, valid, 0, volatile=True)
            polls, over = 0, 0
            while (over == 0) & (tl.max((valid & ((word >> 32) != number)).to(tl.int32), 0) != 0):
                word = tl.load(at, valid, 0, volatile=True)
                polls += 1
                if polls % POLLS_PER_ABORT_CHECK == 0:
                    over = tl.load(abort_flag, volatile=True)
        low += (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high += ((word >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    if HAS_BIAS:
        low += tl.load(bias + even, valid, 0.0).to(tl.float32)
        high += tl.load(bias + odd, valid, 0.0).to(tl.float32)
    if HAS_ADDED_BIAS:
        low += tl.load(added_bias + even, valid, 0.0).to(tl.float32)
        high += tl.load(added_bias + odd, valid, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        from_row = tl.load(residual_rows + row) if HAS_ROWS else row
        low += tl.load(residual + from_row * H + even, valid, 0.0).to(tl.float32)
        high += tl.load(residual + from_row * H + odd, valid, 0.0).to(tl.float32)
    low = low.to(dtype)
    high = high.to(dtype)
    tl.store(total_out + row * H + even, low, valid)
    tl.store(total_out + row * H + odd, high, valid)
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    if RMS:
        low = tl.where(valid, low, 0.0)
        high = tl.where(valid, high, 0.0)
    else:
        mean = tl.sum(tl.where(valid, low + high, 0.0), 0) / H
        low = tl.where(valid, low - mean, 0.0)
        high = tl.where(valid, high - mean, 0.0)
    scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / H + eps)
    for half in tl.static_range(2):
        at = even if half == 0 else odd
        centred = low if half == 0 else high
        gain = tl.load(weight + at, valid, 0.0).to(tl.float32)
        if OFFSET:
            gain += 1.0
        shift = 0.0
        if HAS_SHIFT:
            shift = tl.load(norm_bias + at, valid, 0.0).to(tl.float32)
        tl.store(out + row * H + at, (centred * scale * gain + shift).to(dtype), valid)


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
    wait_for_inputs(PDL)
    number = tl.load(exchanges + slot)
    if ANY_ROWS:
        row = slot
        while row < rows:
            number += 1
            _exchange_row(
                row, slot, number, parts, part_stride, bias, added, added_stride, added_bias, residual,
                residual_rows, total_out, weight, norm_bias, out, addresses, mailbox, abort_flag, eps, RANK, RANKS,
                MAX_ROWS, H, PAIRS, PARTS, ADDED, HAS_BIAS, HAS_ADDED_BIAS, HAS_RESIDUAL, HAS_ROWS, HAS_SHIFT, RMS,
                OFFSET,
            )  # fmt: skip
            row += MAX_ROWS
    else:
        number += 1
        _exchange_row(
            slot, slot, number, parts, part_stride, bias, added, added_stride, added_bias, residual,
            residual_rows, total_out, weight, norm_bias, out, addresses, mailbox, abort_flag, eps, RANK, RANKS,
            MAX_ROWS, H, PAIRS, PARTS, ADDED, HAS_BIAS, HAS_ADDED_BIAS, HAS_RESIDUAL, HAS_ROWS, HAS_SHIFT, RMS, OFFSET,
        )  # fmt: skip
    tl.store(exchanges + slot, number)  # last: every warp of this program has read it by then


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
        ANY_ROWS=peers.fixed_order,
        H=width,
        PAIRS=triton.next_power_of_2(width) // 2,
        **constants_of(sum_),
        HAS_SHIFT=bias_h is not None,
        RMS=rms,
        OFFSET=unit_offset,
        num_warps=max(1, min(16, triton.next_power_of_2(width) // 256)),
        **overlapped(weight_h),
    )
    return out_th, total_th
