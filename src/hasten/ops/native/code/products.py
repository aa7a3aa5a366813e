"""Products with weights in panels, and what is done to their results. Addresses are of fp32 numbers.

A panel has 32 output features: for each input feature in turn, its weight in each of them. So a product reads a weight
from its beginning to its end, with up to 8 rows of inputs at a time in registers. Output features that fill no panel
are followed by zeros.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import (
    BYTES,
    F32,
    I64,
    LANES,
    VECTOR,
    add,
    constant,
    div,
    exp,
    fma,
    fused,
    larger,
    load,
    load_f32,
    load_i64,
    mul,
    prefetched,
    read,
    signed,
    splat,
    spread,
    stack,
    store,
    store_f32,
    sub,
    write,
)

_f32 = np.float32
_VECTORS = 2
_WIDTH = _VECTORS * LANES
"""Output features of a panel."""
_ROWS = 8
"""Most rows at a time: with two vectors of a panel for each, they fill half of a processor's registers."""
_TOGETHER = 256
"""Rows that are multiplied by all panels before the next are: they and their results stay in a processor's caches."""
_MOST_INPUTS = 1024
"""Input features of a panel whose successor has room in the second-level cache, too."""
_UNROLLED = 4
_AHEAD = 2048
"""Bytes of a panel that are fetched before they are needed."""
_FEW = 4
"""Rows up to which a panel is read so steadily that processors fetch it by themselves."""


def _loop(rows: int, *, fetches_next: bool = False) -> Any:
    """A function that multiplies this number of rows by a panel: tile [rows, 32].

    Its arguments are the address of the first row, the bytes from row to row, the panel, the number of input features
    and the tile. With `fetches_next` the last one is what comes to the second-level cache meanwhile, a quarter as many
    bytes as the panel has: the next panel, which the first rows would else wait for.
    """

    def code(context, b, _signature, args):
        x, stride, panel, inputs, tile, *following = args
        before, body, after = b.block, b.append_basic_block("features"), b.append_basic_block("done")
        starts = [b.add(x, b.mul(stride, ir.Constant(I64, row))) for row in range(rows)]
        whole = b.and_(inputs, ir.Constant(I64, -_UNROLLED))
        rest, tail = b.append_basic_block("rest"), b.append_basic_block("feature")
        b.cbranch(b.icmp_signed(">", whole, ir.Constant(I64, 0)), body, rest)

        def step(at: Any, sums: list[Any], count: int) -> list[Any]:
            """The sums with the products of `count` features from `at` on."""
            for line in range(2 if fetches_next and count == _UNROLLED else 0):
                start = b.add(following[0], b.mul(at, ir.Constant(I64, _VECTORS * BYTES // _UNROLLED)))
                prefetched(b, [b.add(start, ir.Constant(I64, line * BYTES))], level=2)
            for feature in range(count):
                address = b.add(at, ir.Constant(I64, feature))
                line = b.add(panel, b.mul(address, ir.Constant(I64, _VECTORS * BYTES)))
                columns = [read(b, VECTOR, b.add(line, ir.Constant(I64, n * BYTES))) for n in range(_VECTORS)]
                for column in range(_VECTORS if rows > _FEW else 0):
                    prefetched(b, [b.add(line, ir.Constant(I64, _AHEAD + column * BYTES))])
                inputs_of = [
                    spread(b, read(b, F32, b.add(start, b.mul(address, ir.Constant(I64, 4))))) for start in starts
                ]
                sums = [fused(b, inputs_of[i // _VECTORS], columns[i % _VECTORS], each) for i, each in enumerate(sums)]
            return sums

        def repeated(block: Any, comes_from: list[tuple[Any, Any, list[Any]]], count: int, end: Any, then: Any) -> Any:
            b.position_at_end(block)
            at, sums = b.phi(I64), [b.phi(VECTOR) for _ in range(rows * _VECTORS)]
            for origin, first, given in comes_from:
                at.add_incoming(first, origin)
                for each, value in zip(sums, given, strict=True):
                    each.add_incoming(value, origin)
            new, following = step(at, sums, count), b.add(at, ir.Constant(I64, count))
            at.add_incoming(following, block)
            for each, value in zip(sums, new, strict=True):
                each.add_incoming(value, block)
            b.cbranch(b.icmp_signed("<", following, end), block, then)
            return following, new

        zeros = [constant(0.0)] * (rows * _VECTORS)
        zero = ir.Constant(I64, 0)
        done, sums = repeated(body, [(before, zero, zeros)], _UNROLLED, whole, rest)
        b.position_at_end(rest)
        at, held = b.phi(I64), [b.phi(VECTOR) for _ in zeros]
        for origin, first, given in ((before, zero, zeros), (body, done, sums)):
            at.add_incoming(first, origin)
            for each, value in zip(held, given, strict=True):
                each.add_incoming(value, origin)
        b.cbranch(b.icmp_signed("<", at, inputs), tail, after)
        _, last = repeated(tail, [(rest, at, held)], 1, inputs, after)
        b.position_at_end(after)
        for number, (early, late) in enumerate(zip(held, last, strict=True)):
            total = b.phi(VECTOR)
            total.add_incoming(early, rest)
            total.add_incoming(late, tail)
            held[number] = total
        for number, total in enumerate(held):
            write(b, total, b.add(tile, ir.Constant(I64, number * BYTES)))
        return context.get_dummy_value()

    if fetches_next:
        return intrinsic(lambda _context, x, stride, panel, inputs, tile, n: (types.void(*[types.int64] * 6), code))
    return intrinsic(lambda _context, x, stride, panel, inputs, tile: (types.void(*[types.int64] * 5), code))


_eight_and_next = _loop(8, fetches_next=True)
_loop1, _loop2, _loop3, _loop4, _loop5, _loop6, _loop7, _loop8 = map(_loop, range(1, _ROWS + 1))
_tile = stack(4 * _ROWS * _WIDTH)
_line = stack(4 * _WIDTH)
_other_line = stack(4 * _WIDTH)


@part
def multiply(x, stride, panel, inputs, tile, left):
    """Multiply the next rows of those that are left by a panel: how many they were."""
    if left >= 8:
        _loop8(x, stride, panel, inputs, tile)
        return 8
    if left == 7:
        _loop7(x, stride, panel, inputs, tile)
        return 7
    if left == 6:
        _loop6(x, stride, panel, inputs, tile)
        return 6
    if left == 5:
        _loop5(x, stride, panel, inputs, tile)
        return 5
    if left == 4:
        _loop4(x, stride, panel, inputs, tile)
        return 4
    if left == 3:
        _loop3(x, stride, panel, inputs, tile)
        return 3
    if left == 2:
        _loop2(x, stride, panel, inputs, tile)
        return 2
    _loop1(x, stride, panel, inputs, tile)
    return 1


@part
def _logistic(x):
    return div(splat(_f32(1)), add(splat(_f32(1)), exp(sub(splat(_f32(0)), x))))


@part
def _erf(x):
    """The error function, to 2e-7. Source: Abramowitz, Stegun, "Handbook of Mathematical Functions", 1964 (7.1.26)."""
    size = larger(x, sub(splat(_f32(0)), x))
    t = div(splat(_f32(1)), fma(size, splat(_f32(0.3275911)), splat(_f32(1))))
    sums = fma(t, splat(_f32(1.061405429)), splat(_f32(-1.453152027)))
    sums = fma(sums, t, splat(_f32(1.421413741)))
    sums = fma(sums, t, splat(_f32(-0.284496736)))
    sums = fma(sums, t, splat(_f32(0.254829592)))
    tail = mul(mul(sums, t), exp(mul(x, sub(splat(_f32(0)), x))))
    return signed(sub(splat(_f32(1)), tail), x)


@part
def _activated(x, activation):
    if activation == 1:
        cubic = mul(fma(mul(x, x), splat(_f32(0.044715)), splat(_f32(1))), x)
        return mul(x, _logistic(mul(cubic, splat(_f32(1.5957691216057308)))))
    if activation == 2:
        return mul(x, _logistic(x))
    if activation == 5:
        return mul(x, _logistic(mul(x, splat(_f32(1.702)))))
    if activation == 3:
        return larger(splat(_f32(0)), x)
    if activation == 6:
        return mul(mul(x, splat(_f32(0.5))), add(splat(_f32(1)), _erf(mul(x, splat(_f32(0.7071067811865476))))))
    if activation == 4:
        positive = larger(splat(_f32(0)), x)
        return mul(positive, positive)
    return x


@part
def copy(source, target, count):
    """Copy `count` numbers."""
    for at in range(0, 4 * count, 4):
        store_f32(target + at, load_f32(source + at))


@part
def _finish_whole(line, bias, residual, out, activation):
    for at in range(0, 4 * 32, 64):
        value = load(line + at)
        if bias:
            value = add(value, load(bias + at))
        value = _activated(value, activation)
        if residual:
            value = add(value, load(residual + at))
        store(out + at, value)


@part
def finish(line, bias, residual, out, count, activation, other):
    """`activation(line + bias) + residual` of the `count` numbers of a panel's row, with a bias of a whole panel.

    `other`: room for a line. The line is overwritten where it is not whole.
    """
    if count == 32:
        _finish_whole(line, bias, residual, out, activation)
    else:
        if residual:
            copy(residual, other, count)
            residual = other
        _finish_whole(line, bias, residual, line, activation)
        copy(line, out, count)


@kernel
def _product(p, thread, threads):
    """`activation(x @ w.T + bias) + residual`: out [t, o], the residual's rows [t] by their numbers, or as they are."""
    rows, inputs, outputs = load_i64(p), load_i64(p + 8), load_i64(p + 16)
    x, stride, panels, bias = load_i64(p + 24), 4 * load_i64(p + 32), load_i64(p + 40), load_i64(p + 48)
    residual, residual_stride, numbers = load_i64(p + 56), 4 * load_i64(p + 64), load_i64(p + 72)
    out, out_stride, activation = load_i64(p + 80), 4 * load_i64(p + 88), load_i64(p + 96)
    tile, line, other = _tile(), _line(), _other_line()
    count = (outputs + 31) // 32
    for first in range(0, rows, _TOGETHER):
        last = min(rows, first + _TOGETHER)
        for panel in range(count * thread // threads, count * (thread + 1) // threads):
            column, here = 128 * panel, min(32, outputs - 32 * panel)
            weights = panels + 128 * inputs * panel
            bias_here = bias + column if bias else 0
            if bias and here < 32:
                copy(bias_here, line, here)
                bias_here = line
            row = first
            while row < last:
                quarter, left, at = (row - first) // 8, last - row, x + row * stride
                if quarter < 4 and left >= 8 and last - first > 8 and inputs <= _MOST_INPUTS:
                    _eight_and_next(at, stride, weights, inputs, tile, weights + (128 + 32 * quarter) * inputs)
                    done = 8
                else:
                    done = multiply(at, stride, weights, inputs, tile, left)
                for each in range(done):
                    number = row + each
                    own = residual + (load_i64(numbers + 8 * number) if numbers else number) * residual_stride + column
                    to = out + number * out_stride + column
                    finish(tile + 128 * each, bias_here, own if residual else 0, to, here, activation, other)
                row += done


@kernel
def _gated(p, thread, threads):
    """`gate(x[:, :o]) * x[:, o:]` of x [t, 2 * o], where o is a multiple of 16: out [t, o]."""
    rows, width, x, out, activation = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24), load_i64(p + 32)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        gate, up, to = x + 8 * width * t, x + 8 * width * t + 4 * width, out + 4 * width * t
        for at in range(0, 4 * width, 64):
            store(to + at, mul(_activated(load(gate + at), activation), load(up + at)))
