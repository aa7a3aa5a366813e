"""The most probable token of each row. Addresses are of fp32 numbers, and of int32 tokens."""

import numpy as np

from hasten.ops.draws import NONE_LEFT
from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import (
    count_equal,
    larger_or_nan,
    load,
    load_f32,
    load_i64,
    splat,
    stack,
    store,
    store_i32,
)

_f32 = np.float32
_lanes = stack(64)
_NONE_LEFT = NONE_LEFT


@part
def _most(row, width):
    """The largest number of a row; NaN where one is."""
    most, whole = splat(_f32(-np.inf)), width // 16 * 16
    for at in range(0, 4 * whole, 64):
        most = larger_or_nan(most, load(row + at))
    lanes = _lanes()
    store(lanes, most)
    found = load_f32(lanes)
    for at in range(4, 64, 4):
        found = _later(found, load_f32(lanes + at))
    for at in range(4 * whole, 4 * width, 4):
        found = _later(found, load_f32(row + at))
    return found


@part
def _later(found, value):
    return value if value > found or value != value else found


@part
def _first(row, width, most):
    """Where the largest number of a row stands first."""
    at, end, greatest = 0, 4 * width, splat(most)
    while at + 64 <= end and not count_equal(load(row + at), greatest):
        at += 64
    while load_f32(row + at) != most:
        at += 4
    return at // 4


@kernel
def _greedy(p, thread, threads):
    """The first of the largest numbers of rows [r, v]: tokens [r]; below 0 where that is not finite."""
    rows, width, x, stride, out = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24), load_i64(p + 32)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        row = x + r * stride
        most = _most(row, width)
        if most == -np.inf:
            token = np.int64(_NONE_LEFT)
        elif most != most or most == np.inf:
            token = np.int64(-1)
        else:
            token = _first(row, width, most)
        store_i32(out + 4 * r, np.int32(token))
