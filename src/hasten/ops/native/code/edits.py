"""Edits of logits, masks of them, and token counts. Addresses are of fp32 logits and int32 numbers.

See `hasten.ops.edits` for the arrays.
"""

import numpy as np
from llvmlite import ir
from numba import types

from hasten.ops.edits import IN_PROMPT
from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import (
    LANES,
    constant,
    intrinsic_of,
    load,
    load_f32,
    load_i32,
    load_i64,
    store,
    store_f32,
    store_i32,
    vector,
)

_IN_OUTPUT = IN_PROMPT - 1
_f32 = np.float32


def _select(b, args):
    lanes = b.bitcast(b.trunc(args[1], ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))
    return b.select(lanes, args[0], constant(float("-inf")))


_left = intrinsic_of((vector, types.int64), vector, _select)
"""Numbers where bits are set, minus infinity elsewhere."""


@part
def _penalize(row, ids, counts, size, penalties):
    repetition, presence, frequency = load_f32(penalties), load_f32(penalties + 4), load_f32(penalties + 8)
    for at in range(0, 4 * size, 4):
        logit, output = row + 4 * load_i32(ids + at), load_i32(counts + at) & _IN_OUTPUT
        x = load_f32(logit)
        x = x / repetition if x > 0 else x * repetition
        if output > 0:
            x -= presence + frequency * _f32(output)
        store_f32(logit, x)


@part
def _copy(source, to, width):
    """Copy a row of numbers."""
    whole = width // 16 * 16
    for at in range(0, 4 * whole, 64):
        store(to + at, load(source + at))
    for at in range(4 * whole, 4 * width, 4):
        store_f32(to + at, load_f32(source + at))


@kernel
def _copied(p, thread, threads):
    """Copy rows of logits [r, v]."""
    rows, width, source, source_stride = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    to = load_i64(p + 32)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        _copy(source + source_stride * r, to + 4 * width * r, width)


@kernel
def _follow(p, thread, threads):
    """Let slots have the counts of others: those of the beams that k beams continue."""
    followers, slots, seats, firsts, parents = (
        load_i64(p),
        load_i64(p + 8),
        load_i64(p + 16),
        load_i64(p + 24),
        load_i64(p + 32),
    )
    ids, counts, sizes, width = load_i64(p + 40), load_i64(p + 48), load_i64(p + 56), 4 * load_i64(p + 64)
    for k in range(followers * thread // threads, followers * (thread + 1) // threads):
        seat = load_i64(seats + 8 * k)
        own = load_i64(slots + 8 * seat)
        other = load_i64(slots + 8 * (load_i64(firsts + 8 * k) + load_i32(parents + 4 * seat)))
        if own != other:
            size = load_i32(sizes + 4 * other)
            _copy(ids + width * other, ids + width * own, np.int64(size))
            _copy(counts + width * other, counts + width * own, np.int64(size))
            store_i32(sizes + 4 * own, size)


@kernel
def _edit(p, thread, threads):
    """Penalties, biases and bans of k rows of logits, in place."""
    edited, x, stride = load_i64(p), load_i64(p + 8), 4 * load_i64(p + 16)
    rows, slots, penalties, chosen = load_i64(p + 24), load_i64(p + 32), load_i64(p + 40), load_i64(p + 48)
    bias_starts, bias_ids, biases = load_i64(p + 56), load_i64(p + 64), load_i64(p + 72)
    ban_starts, ban_ids, ban_after = load_i64(p + 80), load_i64(p + 88), load_i64(p + 96)
    tokens, ids, counts, sizes, width = (
        load_i64(p + 104),
        load_i64(p + 112),
        load_i64(p + 120),
        load_i64(p + 128),
        4 * load_i64(p + 136),
    )
    for k in range(edited * thread // threads, edited * (thread + 1) // threads):
        row, slot = x + stride * load_i32(rows + 4 * k), np.int64(load_i32(slots + 4 * k))
        if slot >= 0:
            own = width * slot
            _penalize(row, ids + own, counts + own, load_i32(sizes + 4 * slot), penalties + 12 * k)
        for n in range(load_i32(bias_starts + 4 * k), load_i32(bias_starts + 4 * k + 4)):
            logit = row + 4 * load_i32(bias_ids + 4 * n)
            store_f32(logit, load_f32(logit) + load_f32(biases + 4 * n))
        last = load_i32(tokens + 4 * load_i32(chosen + 4 * k))
        for n in range(load_i32(ban_starts + 4 * k), load_i32(ban_starts + 4 * k + 4)):
            after = load_i32(ban_after + 4 * n)
            if after < 0 or after == last:
                store_f32(row + 4 * load_i32(ban_ids + 4 * n), _f32(-np.inf))


@kernel
def _count(p, thread, threads):
    """Add a token of each row to the output counts of its slot."""
    rows, slots, tokens = load_i64(p), load_i64(p + 8), load_i64(p + 16)
    ids, counts, sizes, width = load_i64(p + 24), load_i64(p + 32), load_i64(p + 40), 4 * load_i64(p + 48)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        slot, token = np.int64(load_i32(slots + 4 * r)), load_i32(tokens + 4 * r)
        if slot >= 0 and token >= 0:
            own, size = width * slot, load_i32(sizes + 4 * slot)
            at = 0
            while at < 4 * size and load_i32(ids + own + at) != token:
                at += 4
            if at == 4 * size:
                store_i32(ids + own + at, token)
                store_i32(counts + own + at, np.int32(0))
                store_i32(sizes + 4 * slot, np.int32(size + 1))
            store_i32(counts + own + at, np.int32(load_i32(counts + own + at) + 1))


@kernel
def _mask(p, thread, threads):
    """Rows of logits, and minus infinity where a row has a mask of bits without its bit: out [r, v]."""
    rows, width, x, stride = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    index, masks, words, out = load_i64(p + 32), load_i64(p + 40), 4 * load_i64(p + 48), load_i64(p + 56)
    whole = width // 16 * 16
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        row, to, number = x + r * stride, out + 4 * width * r, np.int64(load_i32(index + 4 * r))
        mask = masks + words * number
        for at in range(0, whole, 16):
            values = load(row + 4 * at)
            if number >= 0:
                values = _left(values, np.int64(load_i32(mask + at // 32 * 4)) >> (at & 16))
            store(to + 4 * at, values)
        for at in range(whole, width):
            keeps = number < 0 or (load_i32(mask + at // 32 * 4) >> (at & 31)) & 1
            store_f32(to + 4 * at, load_f32(row + 4 * at) if keeps else _f32(-np.inf))
