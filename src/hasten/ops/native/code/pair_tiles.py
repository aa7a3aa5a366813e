"""Products of rows rounded to bf16 with weights in bf16 in panels, by AMX: see `rounded.py`.

Two blocks of 16 rows by a panel take all tiles: four of sums, two of rows, two of weights.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.amx import configure, moved, release, tile
from hasten.ops.native.code.bf16 import LINE, element, plus, repeated
from hasten.ops.native.code.functions import kernel_of, part
from hasten.ops.native.code.rounded import TILE, VECTORS, product_of
from hasten.ops.native.code.simd import (
    BYTES,
    I64,
    called,
    prefetched,
    stack,
    store_i64,
)

_AHEAD = 8192
"""Bytes of panels that are fetched before they are needed, by the first rows."""
_SHAPE = (1, 0, 0x0040004000400040, 0x0040004000400040, 0, 0, 0x1010101010101010, 0)
"""Of all eight tiles: 16 rows of 64 bytes each."""
_shape = stack(64)


def _tiles(blocks: int, lines: int) -> Any:
    """A function that multiplies this number of blocks of 16 rows by a panel.

    It fetches `lines` cache lines for each tile of the panel, from its last argument on.
    """

    def code(context, b, _signature, args):
        x, apart, panel, steps, sums, following = args

        far, near = ir.Constant(I64, LINE), ir.Constant(I64, 64)

        def body(at: Any, _held: list[Any]) -> list[Any]:
            weights, fetched = element(b, panel, at, 16 * LINE), element(b, following, at, 64 * lines)
            for line in range(lines):
                prefetched(b, [plus(b, fetched, 64 * line)], level=2)
            for n in range(VECTORS):
                moved(b, "tileloadd64", 6 + n, plus(b, weights, n * BYTES), far)
            for block in range(blocks):
                start = element(b, x, at, TILE)
                start = b.add(start, b.mul(apart, ir.Constant(I64, block)))
                moved(b, "tileloadd64", 4 + block, start, near)
                for n in range(VECTORS):
                    numbers = [tile(VECTORS * block + n), tile(4 + block), tile(6 + n)]
                    called(b, "llvm.x86.tdpbf16ps", ir.VoidType(), numbers)
            return []

        for number in range(VECTORS * blocks):
            called(b, "llvm.x86.tilezero", ir.VoidType(), [tile(number)])
        repeated(b, steps, 1, [], body)
        for block in range(blocks):
            for n in range(VECTORS):
                moved(b, "tilestored64", VECTORS * block + n, plus(b, sums, 16 * LINE * block + n * BYTES), far)
        return context.get_dummy_value()

    return intrinsic(lambda _context, x, apart, panel, steps, tile, following: (types.void(*[types.int64] * 6), code))


_block, _first_blocks, _two_blocks = _tiles(1, 32), _tiles(2, 32), _tiles(2, 0)


@part
def _multiply(x, apart, row, left, lower, panel, steps, tile):
    at = x + row // 16 * apart
    if left <= 16 and lower < 16:
        _block(at, apart, panel, steps, tile, panel + _AHEAD)
    elif row == 0:
        _first_blocks(at, apart, panel, steps, tile, panel + _AHEAD)
    else:
        _two_blocks(at, apart, panel, steps, tile, 0)


_product = product_of(_multiply, 32)


@kernel_of("bf16")
def _tiles_product(p, thread, threads):
    """As `half_product`, of rows in tiles."""
    shape = _shape()
    for word, content in enumerate(_SHAPE):
        store_i64(shape + 8 * word, content)
    configure(shape)
    _product(p, thread, threads)
    release()
