"""Log-probabilities and the greatest numbers of rows. Addresses are of fp32 numbers, and of int32 tokens and places."""

import numpy as np

from hasten.ops.native.code import wide
from hasten.ops.native.code.choice import _most
from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import (
    count_greater,
    load,
    load_f32,
    load_i32,
    load_i64,
    splat,
    stack,
    store_f32,
    store_i32,
)

_f32, _f64 = np.float32, np.float64
_FRACTION, _ONE = (1 << 52) - 1, 1023 << 52
_lanes = stack(32)


@part
def _log(x):
    """Of a number from 1 on: its power of 2, and the series of the inverse hyperbolic tangent for the rest."""
    bits = wide.bits(x)
    power, rest = (bits >> 52) - 1023, wide.from_bits((bits & _FRACTION) | _ONE)
    if rest > 1.4142135623730951:
        power, rest = power + 1, rest / 2
    ratio = (rest - 1) / (rest + 1)
    square, series = ratio * ratio, 0.0
    for odd in range(23, 0, -2):
        series = series * square + 1.0 / odd
    return power * 0.6931471805599453 + 2 * ratio * series


@part
def _log_sum(row, width, most):
    """The logarithm of the sum of the powers of e of a row, whose greatest number is `most`."""
    greatest, sums, whole = wide.splat(_f64(most)), wide.splat(0.0), width // 8 * 8
    for at in range(0, 4 * whole, 32):
        sums = wide.add(sums, wide.exp(wide.sub(wide.widened(row + at), greatest)))
    if whole < width:
        rest = _lanes()
        for lane in range(8):
            store_f32(rest + 4 * lane, load_f32(row + 4 * (whole + lane)) if whole + lane < width else _f32(-np.inf))
        sums = wide.add(sums, wide.exp(wide.sub(wide.widened(rest), greatest)))
    return _f64(most) + _log(wide.total(sums))


@part
def _rank(row, width, value):
    """1 for the greatest number of a row, or one more for each that is greater than `value`."""
    rank, values, whole = 1, splat(value), width // 16 * 16
    for at in range(0, 4 * whole, 64):
        rank += count_greater(load(row + at), values)
    for at in range(4 * whole, 4 * width, 4):
        rank += load_f32(row + at) > value
    return rank


@part
def _put(values, ids, held, count, value, index):
    """Put a number into the greatest ones so far, behind its equals, if it is one of them; how many there are now."""
    if held == count:
        if not value > load_f32(values + 4 * (held - 1)):
            return held
    else:
        held += 1
    at = 4 * (held - 1)
    while at > 0 and value > load_f32(values + at - 4):
        store_f32(values + at, load_f32(values + at - 4))
        store_i32(ids + at, load_i32(ids + at - 4))
        at -= 4
    store_f32(values + at, value)
    store_i32(ids + at, np.int32(index))
    return held


@part
def _top(row, width, count, values, ids):
    """The `count` greatest numbers of a row, in descending order and of equals the first first, and their places."""
    held, at = 0, 0
    while at < min(count, width):
        held = _put(values, ids, held, count, load_f32(row + 4 * at), at)
        at += 1
    least = splat(load_f32(values + 4 * (held - 1)))
    while at + 16 <= width:
        if count_greater(load(row + 4 * at), least):
            for index in range(at, at + 16):
                held = _put(values, ids, held, count, load_f32(row + 4 * index), index)
            least = splat(load_f32(values + 4 * (held - 1)))
        at += 16
    while at < width:
        held = _put(values, ids, held, count, load_f32(row + 4 * at), at)
        at += 1


@kernel
def _largest(p, thread, threads):
    """The greatest numbers of rows [r, v]: values and places [r, k]."""
    rows, width, x, stride = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    count, values, ids = load_i64(p + 32), load_i64(p + 40), load_i64(p + 48)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        own = 4 * r * count
        _top(x + r * stride, width, count, values + own, ids + own)


@kernel
def _log_softmax(p, thread, threads):
    """Log-probabilities of all numbers of rows [r, v]."""
    rows, width, x, stride = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    out = load_i64(p + 32)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        row, to = x + r * stride, out + 4 * width * r
        total = _log_sum(row, width, _most(row, width))
        for at in range(0, 4 * width, 4):
            store_f32(to + at, _f32(_f64(load_f32(row + at)) - total))


@kernel
def _logprobs(p, thread, threads):
    """Log-probabilities and ranks of tokens [r], and those of the most probable ones [r, k], of rows [r, v].

    A row's token, rank and log-probability stand `stride` bytes behind those of the row before, the others
    `top_stride`.
    """
    rows, width, x, x_stride = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    tokens, count, copies, ranks = load_i64(p + 32), load_i64(p + 40), load_i64(p + 48), load_i64(p + 56)
    chosen, stride, values, ids = load_i64(p + 64), 4 * load_i64(p + 72), load_i64(p + 80), load_i64(p + 88)
    top_stride = 4 * load_i64(p + 96)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        row, own, top = x + r * x_stride, stride * r, top_stride * r
        total = _log_sum(row, width, _most(row, width))
        token = load_i32(tokens + 4 * r)
        mine = load_f32(row + 4 * max(token, 0))
        store_f32(chosen + own, _f32(_f64(mine) - total))
        store_i32(ranks + own, np.int32(_rank(row, width, mine)))
        if copies:
            store_i32(copies + own, token)
        if count:
            _top(row, width, count, values + top, ids + top)
        for at in range(top, top + 4 * count, 4):
            store_f32(values + at, _f32(_f64(load_f32(values + at)) - total))
