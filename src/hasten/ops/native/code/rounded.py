"""Products of rows rounded to bf16 with weights in bf16 in panels, by instructions that add up pairs; AVX-512 BF16.

Rows are laid out in tiles of 16 rows by 32 features, as AMX takes them too (`pair_tiles.py`). Sums are in fp32.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.bf16 import LINE, element, plus, repeated
from hasten.ops.native.code.functions import kernel_of, part
from hasten.ops.native.code.products import copy, finish
from hasten.ops.native.code.simd import (
    BYTES,
    I32,
    LANES,
    VECTOR,
    WHOLE,
    add,
    called,
    constant,
    load,
    load_halves,
    load_i64,
    prefetch_second,
    read,
    splat,
    spread,
    stack,
    store,
    store_halves,
    sub,
    write,
)

_f32 = np.float32
VECTORS = 2
TILE = 1024
"""Bytes of a tile of 16 rows, or of pairs of weights."""
_ROWS = 8
"""Rows that are multiplied at a time: as in `products.py`."""
_GROUP = 1 << 19
"""Bytes of panels that all rows are multiplied by before the next are read: a quarter of a second-level cache."""
_tile = stack(LINE * 32)
_line = stack(LINE)
_other_line = stack(LINE)
_last = stack(LINE)


class _BFloat(ir.Type):
    """LLVM's type, which llvmlite has no name of."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_HALVES = ir.VectorType(_BFloat(), 2 * LANES)


@part
def _round(source, to, lower):
    """Round 32 numbers, and what they lose by it, which goes `lower` bytes further on unless that is 0."""
    for at in range(0, 64, 32):
        values = load(source + 2 * at)
        store_halves(to + at, values)
        if lower:
            store_halves(to + lower + at, sub(values, load_halves(to + at)))


@kernel_of("bf16")
def _round_to_tiles(p, thread, threads):
    """Rows [t, h] in bf16 in tiles of 16 rows by 32 features: out [t / 16, h / 32, 16, 32], both rounded up.

    With `lower` rows, what row t loses by it is row t + `lower`.
    """
    rows, inputs, x, stride = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    lower, out = load_i64(p + 32), load_i64(p + 40)
    last, whole, size = _last(), inputs // 32 * 32, (inputs + 31) // 32 * 1024
    below = size if lower == 16 else 64 * lower
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        source, to = x + t * stride, out + t // 16 * size + t % 16 * 64
        for at in range(0, whole, 32):
            _round(source + 4 * at, to + 32 * at, below)
        if whole < inputs:
            store(last, splat(_f32(0)))
            store(last + 64, splat(_f32(0)))
            copy(source + 4 * whole, last, inputs - whole)
            _round(last, to + 32 * whole, below)


@part
def _fetch(at, stride, count):
    """Fetch lines of two vectors, which are read or overwritten soon."""
    for _ in range(count):
        prefetch_second(at)
        prefetch_second(at + 64)
        at += stride


def product_of(multiply: Any, most: int) -> Any:
    """A function that computes `half_product` of rounded rows by another, which multiplies up to `most` by a panel.

    That one's arguments are the tiles of all rows, the bytes from 16 rows to the next, the first row, how many are
    left, `lower` as in `round_to_tiles`, the panel, its tiles, and the sums. What is behind the last row is not read.
    """

    @part
    def product(p, thread, threads):
        rows, inputs, outputs, lower = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24)
        x, panels, bias = load_i64(p + 32), load_i64(p + 40), load_i64(p + 48)
        residual, residual_stride, numbers = load_i64(p + 56), 4 * load_i64(p + 64), load_i64(p + 72)
        out, activation = load_i64(p + 80), load_i64(p + 88)
        tile, line, other = _tile(), _line(), _other_line()
        count, steps = (outputs + 31) // 32, (inputs + 31) // 32
        apart, size = 1024 * steps, 2048 * steps
        begin, end = count * thread // threads, count * (thread + 1) // threads
        group = max(1, _GROUP // size)
        for first in range(begin, end, group):
            for row in range(0, rows, most):
                together = min(most, rows - row)
                for panel in range(first, min(end, first + group)):
                    column, here = 128 * panel, min(32, outputs - 32 * panel)
                    bias_here = bias + column if bias else 0
                    if bias and here < 32:
                        copy(bias_here, line, here)
                        bias_here = line
                    to, own = out + 4 * outputs * row + column, residual + column
                    if rows > 8:
                        _fetch(to, 4 * outputs, together)
                    if rows > 8 and residual and not numbers:
                        _fetch(own + row * residual_stride, residual_stride, together)
                    multiply(x, apart, row, rows - row, lower, panels + size * panel, steps, tile)
                    for each in range(together):
                        sums = tile + 128 * each
                        if lower:
                            store(sums, add(load(sums), load(sums + 128 * lower)))
                            store(sums + 64, add(load(sums + 64), load(sums + 128 * lower + 64)))
                        added = load_i64(numbers + 8 * (row + each)) if numbers else row + each
                        added = own + added * residual_stride if residual else 0
                        finish(sums, bias_here, added, to, here, activation, other)
                        to += 4 * outputs

    return product


def _eight_rows(context, b, _signature, args):
    """`_ROWS` rows of tiles by a panel: tile [8, 32]."""
    x, panel, steps, tile = args

    def body(at: Any, held: list[Any]) -> list[Any]:
        sums, rows, weights = list(held), element(b, x, at, TILE), element(b, panel, at, 16 * LINE)
        for pair in range(16):
            columns = [
                b.bitcast(read(b, WHOLE, plus(b, weights, pair * LINE + n * BYTES)), _HALVES) for n in range(VECTORS)
            ]
            for row in range(_ROWS):
                both = b.bitcast(spread(b, read(b, I32, plus(b, rows, 64 * row + 4 * pair))), _HALVES)
                for n in range(VECTORS):
                    operands = [sums[row * VECTORS + n], both, columns[n]]
                    name = "llvm.x86.avx512bf16.dpbf16ps.512"
                    sums[row * VECTORS + n] = called(b, name, VECTOR, operands)
        return sums

    sums = repeated(b, steps, 1, [constant(0.0)] * (_ROWS * VECTORS), body)
    for number, total in enumerate(sums):
        write(b, total, plus(b, tile, number * BYTES))
    return context.get_dummy_value()


_eight = intrinsic(lambda _context, x, panel, steps, tile: (types.void(*[types.int64] * 4), _eight_rows))


@part
def _multiply(x, apart, row, left, lower, panel, steps, tile):
    _eight(x + row // 16 * apart + row % 16 * 64, panel, steps, tile)


_product = product_of(_multiply, _ROWS)


@kernel_of("bf16")
def _pairs_product(p, thread, threads):
    """As `half_product`, of rows in tiles."""
    _product(p, thread, threads)
