"""Products with weights as they are loaded, an output feature a row: those of tables that are looked up, too.

Addresses are of fp32 numbers. A row has a multiple of 16 of them; their products are added up in 16 sums, whatever the
number of rows that are multiplied together.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import (
    F32,
    I64,
    VECTOR,
    called,
    constant,
    fused,
    load_f32,
    load_i64,
    read,
    stack,
    store_f32,
    write,
)

_f32 = np.float32
_ROWS = 4
_FEATURES = 4


def _loop(rows: int, features: int) -> Any:
    """A function that multiplies so many rows by as many rows of a weight: tile [rows, 4].

    Its arguments are the address of the first row, the bytes from row to row, the first row of the weight, the bytes of
    a row of it, and the tile.
    """

    def code(context, b, _signature, args):
        x, stride, weight, size, tile = args
        before, body, after = b.block, b.append_basic_block("numbers"), b.append_basic_block("done")
        inputs = [b.add(x, b.mul(stride, ir.Constant(I64, row))) for row in range(rows)]
        columns = [b.add(weight, b.mul(size, ir.Constant(I64, feature))) for feature in range(features)]
        b.branch(body)
        b.position_at_end(body)
        at = b.phi(I64)
        at.add_incoming(ir.Constant(I64, 0), before)
        sums = [[b.phi(VECTOR) for _ in columns] for _ in inputs]
        weights = [read(b, VECTOR, b.add(each, at)) for each in columns]
        following = b.add(at, ir.Constant(I64, 64))
        at.add_incoming(following, body)
        new = []
        for each, row in zip(inputs, sums, strict=True):
            values = read(b, VECTOR, b.add(each, at))
            new.append([fused(b, values, column, total) for column, total in zip(weights, row, strict=True)])
        for row, results in zip(sums, new, strict=True):
            for phi, result in zip(row, results, strict=True):
                phi.add_incoming(constant(0.0), before)
                phi.add_incoming(result, body)
        b.cbranch(b.icmp_signed("<", following, size), body, after)
        b.position_at_end(after)
        for number, results in enumerate(new):
            for feature, result in enumerate(results):
                operands = [ir.Constant(F32, -0.0), result]
                added = called(b, "llvm.vector.reduce.fadd.v16f32", F32, operands, fastmath=("reassoc",))
                write(b, added, b.add(tile, ir.Constant(I64, 4 * (_FEATURES * number + feature))))
        return context.get_dummy_value()

    return intrinsic(lambda _context, x, stride, weight, size, tile: (types.void(*[types.int64] * 5), code))


_loop1, _loop2, _loop4 = (_loop(rows, _FEATURES) for rows in (1, 2, 4))
_last1, _last2, _last4 = (_loop(rows, 1) for rows in (1, 2, 4))
_tile = stack(4 * _ROWS * _FEATURES)


@part
def _multiply(x, stride, weight, size, tile, rows):
    if rows == 4:
        _loop4(x, stride, weight, size, tile)
    elif rows == 2:
        _loop2(x, stride, weight, size, tile)
    else:
        _loop1(x, stride, weight, size, tile)


@part
def _multiply_last(x, stride, weight, size, tile, rows):
    if rows == 4:
        _last4(x, stride, weight, size, tile)
    elif rows == 2:
        _last2(x, stride, weight, size, tile)
    else:
        _last1(x, stride, weight, size, tile)


@part
def _single(x, size, weight, bias, out, first, end):
    """Output features of a single row, so that memory is read from beginning to end: a processor fetches that ahead."""
    tile = _tile()
    for feature in range(first, end):
        _last1(x, size, weight + feature * size, size, tile)
        more = load_f32(bias + 4 * feature) if bias else _f32(0)
        store_f32(out + 4 * feature, load_f32(tile) + more)


@kernel
def _rows(p, thread, threads):
    """`x @ w.T + bias`: out [t, o]."""
    rows, size, outputs = load_i64(p), 4 * load_i64(p + 8), load_i64(p + 16)
    x, stride, weight = load_i64(p + 24), 4 * load_i64(p + 32), load_i64(p + 40)
    bias, out = load_i64(p + 48), load_i64(p + 56)
    if rows == 1:
        _single(x, size, weight, bias, out, outputs * thread // threads, outputs * (thread + 1) // threads)
        return
    tile, fours = _tile(), (outputs + 3) // 4
    for four in range(fours * thread // threads, fours * (thread + 1) // threads):
        first = 4 * four
        count = min(4, outputs - first)
        row = 0
        while row < rows:
            left = rows - row
            together = 4 if left >= 4 else 2 if left >= 2 else 1
            if count == 4:
                _multiply(x + row * stride, stride, weight + first * size, size, tile, together)
            for feature in range(count):
                if count < 4:
                    at = weight + (first + feature) * size
                    _multiply_last(x + row * stride, stride, at, size, tile + 4 * feature, together)
                more = load_f32(bias + 4 * (first + feature)) if bias else _f32(0)
                for each in range(together):
                    to = out + 4 * (outputs * (row + each) + first + feature)
                    store_f32(to, load_f32(tile + 4 * (4 * each + feature)) + more)
            row += together
