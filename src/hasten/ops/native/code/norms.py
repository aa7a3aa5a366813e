"""Norms of rows, rows of tables, and multiples.

Addresses are of fp32 numbers, but for ids, which are int64, and int8 tables.
"""

import numpy as np

from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import (
    add,
    fma,
    load,
    load_bytes,
    load_f32,
    load_f64,
    load_i8,
    load_i64,
    mul,
    splat,
    store,
    store_f32,
    sub,
    widened,
)
from hasten.ops.native.code.simd import total as added

_f32 = np.float32


@part
def _sum(row, width):
    sums, rest = splat(_f32(0)), _f32(0)
    whole = width // 16 * 16
    for at in range(0, whole, 16):
        sums = add(sums, load(row + 4 * at))
    for at in range(whole, width):
        rest += load_f32(row + 4 * at)
    return added(sums) + rest


@part
def _squares(row, width, mean):
    sums, rest, means = splat(_f32(0)), _f32(0), splat(mean)
    whole = width // 16 * 16
    for at in range(0, whole, 16):
        off = sub(load(row + 4 * at), means)
        sums = fma(off, off, sums)
    for at in range(whole, width):
        deviation = load_f32(row + 4 * at) - mean
        rest += deviation * deviation
    return added(sums) + rest


@kernel
def _norm(p, thread, threads):
    """Rows x [t, h], or rows `ids` [t] of a table x, normed: out [t, h]."""
    rows, width, x, ids = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24)
    weight, bias, out = load_i64(p + 32), load_i64(p + 40), load_i64(p + 48)
    eps, rms, offset = _f32(load_f64(p + 56)), load_i64(p + 64), _f32(load_i64(p + 72))
    whole = width // 16 * 16
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        row = x + 4 * width * (load_i64(ids + 8 * t) if ids else t)
        to = out + 4 * width * t
        mean = _f32(0) if rms else _sum(row, width) / _f32(width)
        scale = _f32(1) / np.sqrt(_squares(row, width, mean) / _f32(width) + eps)
        means, scales, offsets = splat(mean), splat(scale), splat(offset)
        for at in range(0, 4 * whole, 64):
            value = mul(mul(sub(load(row + at), means), scales), add(load(weight + at), offsets))
            store(to + at, add(value, load(bias + at)) if bias else value)
        for at in range(4 * whole, 4 * width, 4):
            normed = (load_f32(row + at) - mean) * scale * (load_f32(weight + at) + offset)
            store_f32(to + at, normed + load_f32(bias + at) if bias else normed)


@kernel
def _gather(p, thread, threads):
    """Rows `ids` [t] of a table x: out [t, h]."""
    rows, width, x, ids, out = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24), load_i64(p + 32)
    whole = width // 16 * 16
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        row, to = x + 4 * width * load_i64(ids + 8 * t), out + 4 * width * t
        for at in range(0, 4 * whole, 64):
            store(to + at, load(row + at))
        for at in range(4 * whole, 4 * width, 4):
            store_f32(to + at, load_f32(row + at))


@kernel
def _gather_bytes(p, thread, threads):
    """Rows `ids` [t] of a table x of int8, each times its scale: out [t, h]."""
    rows, width, x, ids = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24)
    scales, out = load_i64(p + 32), load_i64(p + 40)
    whole = width // 16 * 16
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        number = load_i64(ids + 8 * t)
        row, to, scale = x + width * number, out + 4 * width * t, load_f32(scales + 4 * number)
        for at in range(0, whole, 16):
            store(to + 4 * at, mul(widened(load_bytes(row + at)), splat(scale)))
        for at in range(whole, width):
            store_f32(to + 4 * at, _f32(load_i8(row + at)) * scale)


@kernel
def _scale(p, thread, threads):
    """Multiply numbers x [n] by a factor, in place, each thread some of them."""
    count, x, factor = load_i64(p), load_i64(p + 8), _f32(load_f64(p + 16))
    begin, end = x + 4 * (count * thread // threads), x + 4 * (count * (thread + 1) // threads)
    whole, factors = begin + (end - begin) // 64 * 64, splat(factor)
    for at in range(begin, whole, 64):
        store(at, mul(load(at), factors))
    for at in range(whole, end, 4):
        store_f32(at, load_f32(at) * factor)
