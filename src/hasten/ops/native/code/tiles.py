"""Products with weights of 8 and 4 bits in panels, for many rows: by tiles of AMX, to the same bits as `integers.py`.

A tile has up to 16 rows of 64 bytes. In a panel of 8 bits the bytes of 64 inputs and 16 output features are a tile as
they stand; weights of 4 bits become bytes first, a part of a panel at a time. Rows of int8 come in tiles, too: for each
step of 64 columns, or of 32 or 16 where these divide a group, those of 16 rows.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.amx import configure, moved, release, tile
from hasten.ops.native.code.functions import kernel_of, part
from hasten.ops.native.code.integers import add_group, halves, sum_of_group
from hasten.ops.native.code.products import copy, finish
from hasten.ops.native.code.simd import (
    I64,
    called,
    fma,
    load,
    load_f32,
    load_i64,
    mul,
    prefetched,
    splat,
    splat_whole,
    stack,
    store,
    store_i32,
    store_whole,
    write,
)

_ROWS = 32
"""Rows of int8 at a time, in two tiles; with two tiles of a panel and four of sums they are all that there are."""
_TOGETHER = 256
"""Rows of int8 that are multiplied by all panels before the next are: they stay in the second-level cache."""
_COLUMNS = 512
"""Columns of a panel that all these rows are multiplied by before the next: they stay in the first-level cache."""
_LINES = 8
"""Lines of the following part of a panel that come to the second-level cache with each step of 64 columns."""
_BLOCKS = 4
"""Times two tiles of rows while which they do, so that all of the part comes."""
_RESULTS = 2
"""Rows of results that come to the caches with each step: else a processor waits for each line that it writes."""


def _loop(sides: int, *, fetches: bool = False) -> Any:
    """A function that adds the products of one or two tiles of rows with a part of a panel to the tiles of sums.

    Its arguments are the address of the rows, the bytes from one tile of rows to the other's, the part of a panel, the
    number of steps and the columns of a step. Meanwhile each step fetches lines of two rows of results, whose address
    and the bytes from row to row are the last arguments; and some of the following weights, if it `fetches` them, from
    the address before these.
    """

    def code(context, b, _signature, args):
        x, apart, panel, steps, depth, following, results, stride = args
        before, body, after = b.block, b.append_basic_block("steps"), b.append_basic_block("done")
        b.branch(body)
        b.position_at_end(body)
        at = b.phi(I64)
        at.add_incoming(ir.Constant(I64, 0), before)
        column = b.mul(at, depth)
        rows = b.add(x, b.mul(column, ir.Constant(I64, 16)))
        line = b.add(panel, b.mul(column, ir.Constant(I64, 32)))
        if fetches:
            first = b.add(following, b.mul(at, ir.Constant(I64, 64 * _LINES)))
            for number in range(_LINES):
                prefetched(b, [b.add(first, ir.Constant(I64, 64 * number))], level=2)

        result = b.add(results, b.mul(stride, b.mul(at, ir.Constant(I64, _RESULTS))))
        for number in range(_RESULTS):
            row = b.add(result, b.mul(stride, ir.Constant(I64, number)))
            for half in range(2):
                prefetched(b, [b.add(row, ir.Constant(I64, 64 * half))], writes=True)

        def multiplied(side: int, half: int) -> None:
            operands = [tile(2 * side + half), tile(4 + side), tile(6 + half)]
            called(b, "llvm.x86.tdpbsud", ir.VoidType(), operands)

        for side in range(sides):
            moved(b, "tileloadd64", 4 + side, rows if side == 0 else b.add(rows, apart), depth)
            for half in range(2):
                if side == 0:
                    moved(b, "tileloadd64", 6 + half, b.add(line, ir.Constant(I64, 64 * half)), ir.Constant(I64, 128))
                multiplied(side, half)
        after_this = b.add(at, ir.Constant(I64, 1))
        at.add_incoming(after_this, body)
        b.cbranch(b.icmp_signed("<", after_this, steps), body, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return intrinsic(lambda _context, x, apart, panel, steps, depth, n, to, by: (types.void(*[types.int64] * 8), code))


def _with_sums(generate: Any) -> Any:
    """A function of the address of sums [32, 32] that does something with each of their tiles that is in use.

    Its second argument is how many rows of tiles there are, 1 or 2.
    """

    def code(context, b, _signature, args):
        whole, sides = args
        for side in range(2):
            if side == 1:
                second, after = b.append_basic_block("second"), b.append_basic_block("done")
                b.cbranch(b.icmp_signed(">", sides, ir.Constant(I64, 1)), second, after)
                b.position_at_end(second)
            for half in range(2):
                generate(b, 2 * side + half, b.add(whole, ir.Constant(I64, 128 * 16 * side + 64 * half)))
        b.branch(after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return intrinsic(lambda _context, whole, sides: (types.void(types.int64, types.int64), code))


def _moved(name: str) -> Any:
    return _with_sums(lambda b, number, address: moved(b, name, number, address, ir.Constant(I64, 128)))


_both, _both_and_next, _single = _loop(2), _loop(2, fetches=True), _loop(1)
_clear = _with_sums(lambda b, number, _address: called(b, "llvm.x86.tilezero", ir.VoidType(), [tile(number)]))
_resume, _keep = _moved("tileloadd64"), _moved("tilestored64")


def _unpack_unit(_context, source, target):
    """Write the bytes of a unit of 4-bit weights."""

    def code(context, b, _signature, args):
        source, target = args
        vectors = [each for half in halves(b, source, 4) for each in half]
        for number, vector in enumerate(vectors):
            write(b, vector, b.add(target, ir.Constant(I64, 64 * number)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


_unpack = intrinsic(_unpack_unit)
_sums = stack(4 * _TOGETHER * 32)
_results = stack(4 * _TOGETHER * 32)
_bytes = stack(32 * _COLUMNS)
_form = stack(64)
_bias_line = stack(4 * 32)
_line = stack(4 * 32)
_other_line = stack(4 * 32)


@part
def _shape(form, rows, depth):
    """Let tiles have the sizes that so many rows and columns of a step need."""
    first, second = min(rows, 16), max(rows - 16, 1)
    store_whole(form, splat_whole(np.int32(0)))
    store_i32(form, np.int32(1))  # the palette: the kind of all sizes
    for at in (16, 20, 28):
        store_i32(form + at, np.int32(64 | 64 << 16))
    store_i32(form + 24, np.int32(depth | depth << 16))
    store_i32(form + 48, np.int32(first | first << 8 | second << 16 | second << 24))
    store_i32(form + 52, np.int32(first | second << 8 | depth // 4 << 16 | depth // 4 << 24))
    configure(form)


@part
def _multiply(x, apart, panel, steps, depth, following, results, stride, sides):
    """Add the products of one or two tiles of rows; `following` is 0 where nothing is to be fetched."""
    if sides == 1:
        _single(x, apart, panel, steps, depth, following, results, stride)
    elif following:
        _both_and_next(x, apart, panel, steps, depth, following, results, stride)
    else:
        _both(x, apart, panel, steps, depth, following, results, stride)


@part
def _scaled_line(whole, tile, digits, sums, sums_stride, scales, zeros, zero, unit, line):
    """A token's line of a panel: the last group's sums, with others where there is a `tile`, times the token's unit."""
    for at in range(0, 128, 64):
        value = sum_of_group(whole + at, digits, sums, sums_stride, zeros + at if zeros else 0, zero)
        scale = load(scales + at)
        value = fma(value, scale, load(tile + at)) if tile else mul(value, scale)
        store(line + at, mul(value, splat(unit)))


@kernel_of("bytes")
def _tiles(p, thread, threads):
    """As `integers` in integers.py, of rows of int8 that stand in tiles."""
    rows, outputs, groups, group = load_i64(p), load_i64(p + 8), load_i64(p + 16), load_i64(p + 24)
    digits = load_i64(p + 32)
    numbers, units, sums, panels = load_i64(p + 40), load_i64(p + 48), load_i64(p + 56), load_i64(p + 64)
    bits, zero, scales, zeros = load_i64(p + 72), load_i64(p + 80), load_i64(p + 88), load_i64(p + 96)
    bias, residual, residual_stride = load_i64(p + 104), load_i64(p + 112), 4 * load_i64(p + 120)
    picked, out, activation, depth = load_i64(p + 128), load_i64(p + 136), load_i64(p + 144), load_i64(p + 152)
    wholes, tiles, plain, form, shape = _sums(), _results(), _bytes(), _form(), 0
    bias_line, line, other = _bias_line(), _line(), _other_line()
    count, width, lines, stride, sums_stride = (
        (outputs + 31) // 32,
        groups * group,
        rows * digits,
        4 * outputs,
        4 * groups,
    )
    for first in range(0, lines, _TOGETHER):
        last = min(lines, first + _TOGETHER)
        for panel in range(count * thread // threads, count * (thread + 1) // threads):
            column, outputs_here = 128 * panel, min(32, outputs - 32 * panel)
            bias_here = bias + column if bias else 0
            if bias and outputs_here < 32:
                copy(bias_here, bias_line, outputs_here)
                bias_here = bias_line
            for number in range(groups):
                of_group = 128 * (panel * groups + number)
                zeros_here = zeros + of_group if zeros else 0
                for start in range(0, group, _COLUMNS):
                    columns, before = min(_COLUMNS, group - start), number * group + start
                    ends, steps = start + columns == group, columns // depth
                    weights = panels + 4 * bits * (panel * width + before)
                    following = weights + 4 * bits * columns
                    if bits == 4:
                        for unit in range(columns // 8):
                            _unpack(weights + 128 * unit, plain + 256 * unit)
                        weights = plain
                    for row in range(first, last, _ROWS):
                        here, block, token = min(_ROWS, last - row), (row - first) // _ROWS, row // digits
                        sides = 1 if here <= 16 else 2
                        if here != shape:
                            _shape(form, here, depth)
                            shape = here
                        whole = wholes + 128 * (row - first) if group > _COLUMNS else wholes
                        if start == 0:
                            _clear(whole, sides)
                        else:
                            _resume(whole, sides)
                        fetched = following + 8 * columns * block if bits == 8 and block < _BLOCKS else 0
                        results = out + stride * (token + _RESULTS * (before // depth) % _ROWS) + column
                        x = numbers + row * width + 16 * before
                        _multiply(x, 16 * width, weights, steps, depth, fetched, results, stride, sides)
                        _keep(whole, sides)
                        tile, of_row = tiles + 128 * ((row - first) // digits), sums + row * sums_stride + 4 * number
                        at, tokens = scales + of_group, here // digits
                        if ends and number < groups - 1:
                            add_group(
                                whole, tile, tokens, digits, of_row, sums_stride, at, zeros_here, zero, number == 0
                            )
                        elif ends:
                            for each in range(tokens):
                                earlier = tile + 128 * each if groups > 1 else 0
                                unit, inputs = (
                                    load_f32(units + 4 * (token + each)),
                                    of_row + digits * each * sums_stride,
                                )
                                _scaled_line(
                                    whole + 128 * digits * each,
                                    earlier,
                                    digits,
                                    inputs,
                                    sums_stride,
                                    at,
                                    zeros_here,
                                    zero,
                                    unit,
                                    line,
                                )
                                own = load_i64(picked + 8 * (token + each)) if picked else token + each
                                own = residual + own * residual_stride + column if residual else 0
                                to = out + stride * (token + each) + column
                                finish(line, bias_here, own, to, outputs_here, activation, other)
    release()
