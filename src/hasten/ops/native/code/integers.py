"""Products with weights of 8 and 4 bits in panels, by instructions that add up four products of bytes; AVX-512 VNNI.

A weight is a whole number of 0 to 255, or of 0 to 15, less its zero, times a scale; both are those of an output feature
and a group of inputs. Inputs are rows of int8 numbers with a unit: one of 8 bits for each value, or the two digits of
one of 15 bits, so that there are two rows of int8. What zeros take from a sum follows from the sum of the inputs.

A panel has 32 output features: for each 4 inputs in turn, as many bytes of each feature. A byte of 4-bit weights has
that of an input in its lower half, and that of the input four later in its upper half.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.functions import kernel_of, part
from hasten.ops.native.code.products import copy, finish
from hasten.ops.native.code.simd import (
    I32,
    I64,
    WHOLE,
    add_whole,
    called,
    clamped,
    fma,
    larger_or_nan,
    load,
    load_bytes,
    load_f32,
    load_i32,
    load_i64,
    load_whole,
    magnitude,
    mul,
    mul_whole,
    narrowed,
    nearest,
    prefetch,
    prefetched,
    read,
    splat,
    splat_whole,
    spread,
    stack,
    store,
    store_bytes,
    store_f32,
    store_i32,
    sub_whole,
    total_whole,
    widened,
    write,
)

_f32 = np.float32
_VECTORS = 2
_ROWS = 8
"""Most rows of int8 at a time."""
_UNIT = 8
"""Inputs that are multiplied at a time: two times four."""
_AHEAD = 2048
"""Bytes of a panel that are fetched before they are needed."""
_FEW = 2
"""Rows of int8 that take sums of their own for each half of a unit: else one would wait for the other."""


def _loop(rows: int, bits: int) -> Any:
    """A function that multiplies so many rows of int8 by a part of a panel: tile [rows, 32] in int32.

    Its arguments are the address of the first row, the bytes from row to row, the panel, the number of units and the
    tile.
    """
    parts = 2 if rows <= _FEW else 1
    size = 32 * bits

    def code(context, b, _signature, args):
        x, stride, panel, units, tile = args
        before, body, after = b.block, b.append_basic_block("units"), b.append_basic_block("done")
        starts = [b.add(x, b.mul(stride, ir.Constant(I64, row))) for row in range(rows)]
        b.branch(body)
        b.position_at_end(body)
        at = b.phi(I64)
        at.add_incoming(ir.Constant(I64, 0), before)
        sums = [[b.phi(WHOLE) for _ in range(rows * _VECTORS)] for _ in range(parts)]
        line = b.add(panel, b.mul(at, ir.Constant(I64, size)))
        start_of_unit = b.mul(at, ir.Constant(I64, _UNIT))
        for offset in range(0, size if rows > _FEW else 0, 64):
            prefetched(b, [b.add(line, ir.Constant(I64, _AHEAD + offset))])
        new = [list(each) for each in sums]
        for half, columns in enumerate(halves(b, line, bits)):
            for row, start in enumerate(starts):
                four = read(b, I32, b.add(start, b.add(start_of_unit, ir.Constant(I64, 4 * half))))
                inputs = spread(b, four)
                for number, column in enumerate(columns):
                    own = new[half % parts]
                    operands = [own[row * _VECTORS + number], column, inputs]
                    own[row * _VECTORS + number] = called(b, "llvm.x86.avx512.vpdpbusd.512", WHOLE, operands)
        following = b.add(at, ir.Constant(I64, 1))
        at.add_incoming(following, body)
        for each, values in zip(sums, new, strict=True):
            for phi, value in zip(each, values, strict=True):
                phi.add_incoming(ir.Constant(WHOLE, [0] * 16), before)
                phi.add_incoming(value, body)
        b.cbranch(b.icmp_signed("<", following, units), body, after)
        b.position_at_end(after)
        for number, value in enumerate(new[0]):
            total = value if parts == 1 else b.add(value, new[1][number])
            write(b, total, b.add(tile, ir.Constant(I64, 64 * number)))
        return context.get_dummy_value()

    return intrinsic(lambda _context, x, stride, panel, units, tile: (types.void(*[types.int64] * 5), code))


def halves(b: Any, line: Any, bits: int) -> list[list[Any]]:
    """The bytes of a unit of weights: two vectors for its first four inputs, and for the others."""
    vectors = [read(b, WHOLE, b.add(line, ir.Constant(I64, 64 * number))) for number in range(bits // 2)]
    if bits == 8:
        return [vectors[:2], vectors[2:]]
    low, four = ir.Constant(WHOLE, [0x0F0F0F0F] * 16), ir.Constant(WHOLE, [4] * 16)
    return [[b.and_(each, low) for each in vectors], [b.and_(b.lshr(each, four), low) for each in vectors]]


_loop1, _loop2, _loop4, _loop8 = (_loop(rows, 8) for rows in (1, 2, 4, 8))
_half_loop1, _half_loop2, _half_loop4, _half_loop8 = (_loop(rows, 4) for rows in (1, 2, 4, 8))
_whole_tile = stack(4 * _ROWS * 32)
_tile = stack(4 * _ROWS * 32)
_line = stack(4 * 32)
_other_line = stack(4 * 32)
_last = stack(64)
_lanes = stack(64)
_TINY = _f32(1.1754943508222875e-38)
"""The smallest normal number."""


@part
def _fitting(left):
    """How many of the rows that are left are multiplied at a time."""
    return 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@part
def _multiply(x, stride, panel, units, tile, rows):
    if rows == 8:
        _loop8(x, stride, panel, units, tile)
    elif rows == 4:
        _loop4(x, stride, panel, units, tile)
    elif rows == 2:
        _loop2(x, stride, panel, units, tile)
    else:
        _loop1(x, stride, panel, units, tile)


@part
def _multiplyhalves(x, stride, panel, units, tile, rows):
    if rows == 8:
        _half_loop8(x, stride, panel, units, tile)
    elif rows == 4:
        _half_loop4(x, stride, panel, units, tile)
    elif rows == 2:
        _half_loop2(x, stride, panel, units, tile)
    else:
        _half_loop1(x, stride, panel, units, tile)


@part
def _less_zeros(line, zeros, zero, inputs):
    """A vector of sums of products, without what zeros of weights added; `inputs`: the sum of a row's inputs."""
    if zeros:
        return sub_whole(load_whole(line), mul_whole(load_whole(zeros), splat_whole(inputs)))
    return sub_whole(load_whole(line), splat_whole(np.int32(zero * inputs)))


@part
def sum_of_group(line, digits, sums, sums_stride, zeros, zero):
    """A vector of a token's sums of products with a group; `line`: those of its first digit."""
    value = widened(_less_zeros(line, zeros, zero, load_i32(sums)))
    if digits == 1:
        return value
    return fma(value, splat(_f32(128)), widened(_less_zeros(line + 128, zeros, zero, load_i32(sums + sums_stride))))


@part
def add_group(whole, tile, rows, digits, sums, sums_stride, scales, zeros, zero, first):
    """Add the sums of a group to those of the `rows` of a tile, times scales; the first group's are stored."""
    for row in range(rows):
        for at in range(0, 128, 64):
            line, inputs = whole + 128 * digits * row + at, sums + digits * row * sums_stride
            value = sum_of_group(line, digits, inputs, sums_stride, zeros + at if zeros else 0, zero)
            to = tile + 128 * row + at
            store(to, mul(value, load(scales + at)) if first else fma(value, load(scales + at), load(to)))


@kernel_of("bytes")
def _integers(p, thread, threads):
    """`activation(x @ w.T + bias) + residual`: out [t, o], the residual's rows [t] by their numbers, or as they are."""
    rows, outputs, groups, group = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24)
    digits = load_i64(p + 32)
    numbers, units, sums, panels = load_i64(p + 40), load_i64(p + 48), load_i64(p + 56), load_i64(p + 64)
    bits, zero, scales, zeros = load_i64(p + 72), load_i64(p + 80), load_i64(p + 88), load_i64(p + 96)
    bias, residual, residual_stride = load_i64(p + 104), load_i64(p + 112), 4 * load_i64(p + 120)
    picked, out, activation = load_i64(p + 128), load_i64(p + 136), load_i64(p + 144)
    whole, tile, line, other = _whole_tile(), _tile(), _line(), _other_line()
    count, stride, sums_stride = (outputs + 31) // 32, groups * group, 4 * groups
    size = 4 * bits * group
    for panel in range(count * thread // threads, count * (thread + 1) // threads):
        column, here = 128 * panel, min(32, outputs - 32 * panel)
        bias_here = bias + column if bias else 0
        if bias and here < 32:
            copy(bias_here, line, here)
            bias_here = line
        row = 0
        while row < rows * digits:
            together = _fitting(rows * digits - row)
            tokens, first = together // digits, row // digits
            for number in range(groups):
                weights = panels + (panel * groups + number) * size
                x = numbers + row * stride + number * group
                if bits == 8:
                    _multiply(x, stride, weights, group // 8, whole, together)
                else:
                    _multiplyhalves(x, stride, weights, group // 8, whole, together)
                at = 128 * (panel * groups + number)
                zeros_here = zeros + at if zeros else 0
                sums_here = sums + row * sums_stride + 4 * number
                add_group(
                    whole, tile, tokens, digits, sums_here, sums_stride, scales + at, zeros_here, zero, number == 0
                )
            for each in range(tokens):
                token, to = first + each, tile + 128 * each
                unit = splat(load_f32(units + 4 * token))
                for at in range(0, 128, 64):
                    store(to + at, mul(load(to + at), unit))
                own = residual + (load_i64(picked + 8 * token) if picked else token) * residual_stride + column
                target = out + 4 * outputs * token + column
                finish(to, bias_here, own if residual else 0, target, here, activation, other)
            row += together


@part
def _round(values, inverse, digits, out, apart):
    """Round 16 values to numbers: the high digits and the low ones, `apart` bytes further on, or one of each."""
    limit = _f32(127) if digits == 1 else _f32(16319)
    number = clamped(nearest(mul(values, splat(inverse))), splat(limit))
    if digits == 1:
        store_bytes(out, narrowed(number))
    else:
        high = nearest(mul(number, splat(_f32(0.0078125))))
        store_bytes(out, narrowed(high))
        store_bytes(out + apart, narrowed(fma(high, splat(_f32(-128)), number)))


@part
def _unit(largest, most):
    """What the numbers of a row are multiples of, by the largest magnitudes of its values."""
    lanes = _lanes()
    store(lanes, largest)
    found = load_f32(lanes)
    for at in range(4, 64, 4):
        value = load_f32(lanes + at)
        found = value if value > found or value != value else found
    least = _TINY * most
    return (least if found < least else found) / most


@part
def _sum_of_bytes(address, count, step, apart):
    """The sum of so many numbers of int8, each `step` of which, a multiple of 16, stand `apart` bytes further on."""
    total = splat_whole(np.int32(0))
    for piece in range(count // step):
        for at in range(address + apart * piece, address + apart * piece + step, 16):
            total = add_whole(total, load_bytes(at))
    return total_whole(total)


@kernel_of("bytes")
def _round_rows(p, thread, threads):
    """Rows [t, h] as int8 numbers, units [t], and sums of the numbers of groups [t, digits, g].

    Numbers [t, digits, g * k] stand in blocks of `side` rows of int8, and in these for each `step` columns in turn
    those of all the rows.
    """
    rows, inputs, groups, group = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24)
    digits, x, stride, numbers = load_i64(p + 32), load_i64(p + 40), 4 * load_i64(p + 48), load_i64(p + 56)
    units, sums, side, step = load_i64(p + 64), load_i64(p + 72), load_i64(p + 80), load_i64(p + 88)
    width, last, piece = groups * group, _last(), min(step, group)
    before, most = inputs // 16 * 16, _f32(127) if digits == 1 else _f32(16319)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        row, line = x + t * stride, t * digits
        to = numbers + line // side * side * width + line % side * step
        store(last, splat(_f32(0)))
        copy(row + 4 * before, last, inputs - before)
        largest = magnitude(load(last))
        for at in range(0, 4 * before, 64):
            prefetch(row + at + _AHEAD)
            largest = larger_or_nan(largest, magnitude(load(row + at)))
        unit = _unit(largest, most)
        store_f32(units + 4 * t, unit)
        inverse = _f32(1) / unit
        for start in range(0, width, step):
            for column in range(start, start + step, 16):
                at = to + start * side + column - start
                if column < before:
                    _round(load(row + 4 * column), inverse, digits, at, step)
                else:
                    _round(load(last), inverse, digits, at, step)
                    store(last, splat(_f32(0)))
        for digit in range(digits):
            for number in range(groups):
                at, to_sum = to + digit * step + number * group * side, sums + 4 * ((line + digit) * groups + number)
                store_i32(to_sum, _sum_of_bytes(at, group, piece, side * piece))
