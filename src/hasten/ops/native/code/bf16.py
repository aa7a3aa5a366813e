"""Products of rows in fp32 with weights in bf16 in panels, and rows of such tables.

Addresses are of fp32 numbers, but for weights. A panel has 32 output features: for each two input features in turn,
their two weights in each output feature. So a vector has 16 pairs, which a shift and a mask widen to fp32, and so it is
what AVX-512 BF16 and AMX multiply (`rounded.py`, `pair_tiles.py`). Input features come in multiples of 32, with zeros
behind the last.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.functions import kernel_of, part
from hasten.ops.native.code.products import copy, finish
from hasten.ops.native.code.simd import (
    BYTES,
    F32,
    I64,
    LANES,
    VECTOR,
    WHOLE,
    constant,
    fma,
    fused,
    load,
    load_f32,
    load_half,
    load_i64,
    prefetched,
    read,
    splat,
    spread,
    stack,
    store,
    store_f32,
    write,
)

_f32 = np.float32
_VECTORS = 2
LINE = _VECTORS * BYTES
"""Bytes of a panel for two input features, and of a row of a tile of results."""
_ROWS = 8
"""Most rows at a time: as in `products.py`."""
_AHEAD = 4096
"""Bytes of a panel that are fetched before they are needed."""
_UNROLLED = 2
_TOGETHER = 256
"""Rows that are multiplied by all panels before the next are."""


def repeated(b: Any, count: Any, step: int, zeros: list[Any], body: Any) -> list[Any]:
    """The sums after `body(at, sums)` for `at` from 0 in steps below `count`, which may be 0; they begin as `zeros`."""
    before, block, after = b.block, b.append_basic_block("body"), b.append_basic_block("after")
    zero = ir.Constant(I64, 0)
    b.cbranch(b.icmp_signed(">", count, zero), block, after)
    b.position_at_end(block)
    at, sums = b.phi(I64), [b.phi(each.type) for each in zeros]
    new = body(at, sums)
    following = b.add(at, ir.Constant(I64, step))
    for phi, first, value in zip([at, *sums], [zero, *zeros], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, count), block, after)
    b.position_at_end(after)
    results = []
    for first, value in zip(zeros, new, strict=True):
        phi = b.phi(first.type)
        phi.add_incoming(first, before)
        phi.add_incoming(value, block)
        results.append(phi)
    return results


def element(b: Any, base: Any, number: Any, size: int) -> Any:
    """The address of an element of `size` bytes."""
    return b.add(base, b.mul(number, ir.Constant(I64, size)))


def plus(b: Any, address: Any, size: int) -> Any:
    """`size` bytes further on."""
    return b.add(address, ir.Constant(I64, size))


def _loop(rows: int) -> Any:
    """A function that multiplies this number of rows in fp32 by a panel: tile [rows, 32].

    Its arguments are the address of the first row, the bytes from row to row, the panel, the number of pairs of input
    features, a multiple of two, and the tile.
    """

    def code(context, b, _signature, args):
        x, stride, panel, pairs, tile = args
        starts = [b.add(x, b.mul(stride, ir.Constant(I64, row))) for row in range(rows)]
        high = ir.Constant(WHOLE, [-65536] * LANES)
        sixteen = ir.Constant(WHOLE, [16] * LANES)

        def body(at: Any, sums: list[Any]) -> list[Any]:
            for pair in range(_UNROLLED):
                number = plus(b, at, pair)
                line = element(b, panel, number, LINE)
                both = [read(b, WHOLE, plus(b, line, n * BYTES)) for n in range(_VECTORS)]
                for n in range(_VECTORS):
                    prefetched(b, [plus(b, line, _AHEAD + n * BYTES)])
                widened = [
                    [b.bitcast(b.shl(each, sixteen), VECTOR) for each in both],
                    [b.bitcast(b.and_(each, high), VECTOR) for each in both],
                ]
                for feature in range(2):
                    inputs = [
                        spread(b, read(b, F32, plus(b, element(b, start, number, 8), 4 * feature))) for start in starts
                    ]
                    for index, total in enumerate(sums):
                        row, n = divmod(index, _VECTORS)
                        sums[index] = fused(b, inputs[row], widened[feature][n], total)
            return sums

        zeros = [constant(0.0)] * (rows * _VECTORS)
        sums = repeated(b, pairs, _UNROLLED, zeros, lambda at, held: body(at, list(held)))
        for number, total in enumerate(sums):
            write(b, total, plus(b, tile, number * BYTES))
        return context.get_dummy_value()

    return intrinsic(lambda _context, x, stride, panel, pairs, tile: (types.void(*[types.int64] * 5), code))


_loop1, _loop2, _loop3, _loop4, _loop5, _loop6, _loop7, _loop8 = map(_loop, range(1, _ROWS + 1))
_tile = stack(LINE * _ROWS)
_line = stack(LINE)
_other_line = stack(LINE)
_weights = stack(LINE)


@part
def _multiply(x, stride, panel, pairs, tile, rows):
    if rows == 8:
        _loop8(x, stride, panel, pairs, tile)
    elif rows == 7:
        _loop7(x, stride, panel, pairs, tile)
    elif rows == 6:
        _loop6(x, stride, panel, pairs, tile)
    elif rows == 5:
        _loop5(x, stride, panel, pairs, tile)
    elif rows == 4:
        _loop4(x, stride, panel, pairs, tile)
    elif rows == 3:
        _loop3(x, stride, panel, pairs, tile)
    elif rows == 2:
        _loop2(x, stride, panel, pairs, tile)
    else:
        _loop1(x, stride, panel, pairs, tile)


@part
def _add_rest(x, stride, panel, first, inputs, tile, rows):
    """Add the products of the input features from `first` on, one by one."""
    weights = _weights()
    for feature in range(first, inputs):
        line = panel + 128 * (feature // 2) + 2 * (feature % 2)
        for output in range(32):
            store_f32(weights + 4 * output, load_half(line + 4 * output))
        for row in range(rows):
            value, to = splat(load_f32(x + row * stride + 4 * feature)), tile + 128 * row
            for at in range(0, 128, 64):
                store(to + at, fma(value, load(weights + at), load(to + at)))


@kernel_of("bf16")
def _gather_halves(p, thread, threads):
    """Rows `ids` [t] of a table in bf16: out [t, h].

    Row v begins at `v // together * far + v % together * near`; its pairs of numbers are `apart` bytes apart.
    """
    rows, width, table, ids = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24)
    together, far, near, apart = load_i64(p + 32), load_i64(p + 40), load_i64(p + 48), load_i64(p + 56)
    out = load_i64(p + 64)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        number = load_i64(ids + 8 * t)
        row, to = table + number // together * far + number % together * near, out + 4 * width * t
        for at in range(width):
            store_f32(to + 4 * at, load_half(row + at // 2 * apart + at % 2 * 2))


@kernel_of("bf16")
def _half_product(p, thread, threads):
    """`activation(x @ w.T + bias) + residual` of rows in fp32, as `product` in `products.py`."""
    rows, inputs, outputs = load_i64(p), load_i64(p + 8), load_i64(p + 16)
    x, stride, panels, bias = load_i64(p + 24), 4 * load_i64(p + 32), load_i64(p + 40), load_i64(p + 48)
    residual, residual_stride, numbers = load_i64(p + 56), 4 * load_i64(p + 64), load_i64(p + 72)
    out, activation = load_i64(p + 80), load_i64(p + 88)
    tile, line, other = _tile(), _line(), _other_line()
    count, size, whole = (outputs + 31) // 32, (inputs + 31) // 32 * 2048, inputs // 4 * 4
    for first in range(0, rows, _TOGETHER):
        last = min(rows, first + _TOGETHER)
        for panel in range(count * thread // threads, count * (thread + 1) // threads):
            column, here, weights = 128 * panel, min(32, outputs - 32 * panel), panels + size * panel
            bias_here = bias + column if bias else 0
            if bias and here < 32:
                copy(bias_here, line, here)
                bias_here = line
            row = first
            while row < last:
                together, at = min(8, last - row), x + row * stride
                _multiply(at, stride, weights, whole // 2, tile, together)
                if whole < inputs:
                    _add_rest(at, stride, weights, whole, inputs, tile, together)
                for each in range(together):
                    number = row + each
                    own = residual + (load_i64(numbers + 8 * number) if numbers else number) * residual_stride + column
                    to = out + 4 * outputs * number + column
                    finish(tile + 128 * each, bias_here, own if residual else 0, to, here, activation, other)
                row += together
