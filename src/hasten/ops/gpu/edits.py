"""Penalties, biases and bans on logits. Shapes: r rows, v vocabulary, k edited rows; b entries of a block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.edits import IN_PROMPT, LogitEdits, TokenCounts
from hasten.ops.gpu.launch import overlapped, wait_for_inputs

_BLOCK = 1024
"""Entries that a program looks at together: a few rounds for a sequence of usual length."""
_MASK_BLOCK = 4096
"""Logits of one program of `mask_logits`, and of a copy."""
_OUTPUT_COUNT = tl.constexpr(IN_PROMPT - 1)


@triton.jit
def _edit(
    logits,
    stride,
    rows,
    slots,
    penalties,
    chosen_at,
    chosen,
    bias_starts,
    bias_ids,
    biases,
    ban_starts,
    ban_ids,
    ban_after,
    ids,
    counts,
    sizes,
    width,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row. Each of the three kinds of edit finds what the ones before it wrote, hence the barriers."""
    k = tl.program_id(0)
    wait_for_inputs(PDL)
    row = logits + tl.load(rows + k).to(tl.int64) * stride
    slot = tl.load(slots + k).to(tl.int64)
    offsets_b = tl.arange(0, BLOCK)
    if slot >= 0:
        repetition = tl.load(penalties + 3 * k)
        presence, frequency = tl.load(penalties + 3 * k + 1), tl.load(penalties + 3 * k + 2)
        size = tl.load(sizes + slot)
        for start in tl.range(0, size, BLOCK):
            at_b = start + offsets_b
            held_b = at_b < size
            ids_b = tl.load(ids + slot * width + at_b, held_b, 0)
            output_b = tl.load(counts + slot * width + at_b, held_b, 0) & _OUTPUT_COUNT
            x_b = tl.load(row + ids_b, held_b, 0.0)
            x_b = tl.where(x_b > 0, x_b / repetition, x_b * repetition)
            x_b -= tl.where(output_b > 0, presence + frequency * output_b.to(tl.float32), 0.0)
            tl.store(row + ids_b, x_b, held_b)
        tl.debug_barrier()
    first, end = tl.load(bias_starts + k), tl.load(bias_starts + k + 1)
    for start in tl.range(first, end, BLOCK):
        at_b = start + offsets_b
        held_b = at_b < end
        ids_b = tl.load(bias_ids + at_b, held_b, 0)
        x_b = tl.load(row + ids_b, held_b, 0.0) + tl.load(biases + at_b, held_b, 0.0)
        tl.store(row + ids_b, x_b, held_b)
    tl.debug_barrier()
    first, end = tl.load(ban_starts + k), tl.load(ban_starts + k + 1)
    last = tl.load(chosen + tl.load(chosen_at + k))
    for start in tl.range(first, end, BLOCK):
        at_b = start + offsets_b
        held_b = at_b < end
        after_b = tl.load(ban_after + at_b, held_b, 0)
        holds_b = held_b & ((after_b < 0) | (after_b == last))
        tl.store(row + tl.load(ban_ids + at_b, held_b, 0), float("-inf"), holds_b)


@triton.jit
def _widen(logits, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A block of one row, in fp32."""
    r = tl.program_id(0).to(tl.int64)
    at_b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    tl.store(out + r * SIZE + at_b, tl.load(logits + r * stride + at_b, at_b < SIZE).to(tl.float32), at_b < SIZE)


def _widened(logits_rv: Tensor) -> Tensor:
    """A copy in fp32, which this kernel makes in half the time that torch takes to convert."""
    rows, size = logits_rv.shape
    assert logits_rv.stride(1) == 1
    out_rv = logits_rv.new_empty(rows, size, dtype=torch.float32)
    grid = (rows, triton.cdiv(size, _MASK_BLOCK))
    options = overlapped(logits_rv)
    _widen[grid](logits_rv, out_rv, logits_rv.stride(0), SIZE=size, BLOCK=_MASK_BLOCK, num_warps=4, **options)
    return out_rv


def edit_logits(
    logits_rv: Tensor, edits: LogitEdits, counts: TokenCounts, chosen_r: Tensor, *, in_place: bool = False
) -> Tensor:
    edited_rv = logits_rv if in_place else _widened(logits_rv)
    _edit[(edits.rows_k.shape[0],)](
        edited_rv,
        edited_rv.stride(0),
        edits.rows_k,
        edits.slots_k,
        edits.penalties_k3,
        edits.chosen_k,
        chosen_r,
        edits.bias_starts,
        edits.bias_ids_b,
        edits.biases_b,
        edits.ban_starts,
        edits.ban_ids_n,
        edits.ban_after_n,
        counts.ids_sw,
        counts.counts_sw,
        counts.sizes_s,
        counts.ids_sw.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
        **overlapped(logits_rv),
    )
    return edited_rv


@triton.jit
def _count(ids, counts, sizes, slots, tokens, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row: find its token among the entries of its slot, or append it."""
    r = tl.program_id(0)
    slot = tl.load(slots + r).to(tl.int64)
    wait_for_inputs(PDL)
    token = tl.load(tokens + r)
    if (slot >= 0) & (token >= 0):
        size = tl.load(sizes + slot)
        found_b = tl.full([BLOCK], -1, tl.int32)
        for start in tl.range(0, size, BLOCK):
            at_b = start + tl.arange(0, BLOCK)
            equal_b = tl.load(ids + slot * width + at_b, at_b < size, -1) == token
            found_b = tl.maximum(found_b, tl.where(equal_b, at_b, -1))
        found = tl.max(found_b, 0)
        if found >= 0:
            count = counts + slot * width + found
            tl.store(count, tl.load(count) + 1)
        else:
            tl.store(ids + slot * width + size, token)
            tl.store(counts + slot * width + size, 1)
            tl.store(sizes + slot, size + 1)


def count_tokens(counts: TokenCounts, slots_r: Tensor, tokens_r: Tensor) -> None:
    _count[(slots_r.shape[0],)](
        counts.ids_sw,
        counts.counts_sw,
        counts.sizes_s,
        slots_r,
        tokens_r,
        counts.ids_sw.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
        **overlapped(tokens_r),
    )


@triton.jit
def _mask(logits, index, masks, out, stride, words, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A block of one row: a copy, with minus infinity for bits that are not set."""
    r = tl.program_id(0).to(tl.int64)
    at_b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held_b = at_b < SIZE
    own = tl.load(index + r).to(tl.int64)
    # Without a mask, all bits are set: the load below is masked off and gives this in their place.
    words_b = tl.load(masks + own * words + at_b // 32, held_b & (own >= 0), -1)
    wait_for_inputs(PDL)
    x_b = tl.load(logits + r * stride + at_b, held_b, 0.0).to(tl.float32)
    tl.store(out + r * SIZE + at_b, tl.where((words_b >> (at_b % 32)) & 1 == 1, x_b, float("-inf")), held_b)


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:
    rows, size = logits_rv.shape
    assert logits_rv.stride(1) == 1
    out_rv = logits_rv.new_empty(rows, size)
    _mask[(rows, triton.cdiv(size, _MASK_BLOCK))](
        logits_rv,
        index_r,
        masks_kw,
        out_rv,
        logits_rv.stride(0),
        masks_kw.stride(0),
        SIZE=size,
        BLOCK=_MASK_BLOCK,
        num_warps=4,
        **overlapped(logits_rv),
    )
    return out_rv
