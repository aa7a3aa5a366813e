"""Products of some hundred rows with weights of 4 bits: a step's weights are widened while those before are multiplied.

The tensor cores read both operands from shared memory: rows, which the device's copy engine brings there, and widened
weights, which threads store there as soon as the product before is done. Weights in registers would be written while
they are still read: Triton does not wait for that where a product of such operands goes on into the next step.

Shapes: M rows, N output features, K columns; values [N, K / 4] in words of four columns, which are 32 apart.
"""

import triton
import triton.language as tl

from hasten.ops.gpu.endings import store_sums
from hasten.ops.gpu.launch import start_next, wait_for_inputs
from hasten.ops.gpu.widening import of_group, quarter, scaled


@triton.jit
def _widened(words, scale_n, zero_n, HAS_ZEROS: tl.constexpr, dtype: tl.constexpr, PDL: tl.constexpr):
    """Words [n, 32] as the weights of 128 columns."""
    first = scaled(quarter(words, 0, dtype, PDL), scale_n, zero_n, HAS_ZEROS)
    second = scaled(quarter(words, 1, dtype, PDL), scale_n, zero_n, HAS_ZEROS)
    third = scaled(quarter(words, 2, dtype, PDL), scale_n, zero_n, HAS_ZEROS)
    fourth = scaled(quarter(words, 3, dtype, PDL), scale_n, zero_n, HAS_ZEROS)
    quarters = tl.join(tl.join(first, third), tl.join(second, fourth))
    return quarters.permute(0, 2, 3, 1).reshape([words.shape[0], 128])


@triton.jit(do_not_specialize=["M"])
def by_tiles(
    x,
    values,
    scales,
    zeros,
    bias,
    out,
    keys,
    cached_values,
    slots,
    inverses,
    M,
    N,
    part_sums,
    arrived,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HELPERS: tl.constexpr,
    HELPED: tl.constexpr,
    LENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLIP: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M rows of a descriptor with BLOCK_N output features; groups are multiples of 128 columns.

    With SPLITS above 1, each split of K writes its own sums [SPLITS, M, N] in fp32; whoever reads them adds them up.
    The first HELPERS programs have no tiles: they multiply the last LENT columns of HELPED tiles each, one after the
    other, and leave the sums [tiles, BLOCK_N, BLOCK_M] in fp32; `arrived` counts them for each tile, and is zero before
    and after a launch. Programs start in their order, so no helper waits for one that waits for it.
    """
    start_next(PDL)
    tiles = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    helps = program < HELPERS
    tile, end_tile = program - HELPERS, program - HELPERS + 1
    begin, last = tl.program_id(1) * (K // SPLITS), (tl.program_id(1) + 1) * (K // SPLITS) - LENT - 128
    if HELPERS > 0:
        tile = tl.where(helps, program * HELPED, tile)
        end_tile = tl.where(helps, tl.minimum(tile + HELPED, tl.num_programs(0) - HELPERS), end_tile)
        begin, last = tl.where(helps, last + 128, begin), tl.where(helps, last + LENT, last)
    first_tile = tile
    while tile < end_tile:
        first_m = tile % tiles * BLOCK_M
        n = tile // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.where(n < N, n, 0)
        start = values + row.to(tl.int64)[:, None] * (K // 4) + tl.arange(0, 32)[None, :]
        words = tl.load(start + begin // 4)
        scale_n, zero_n = of_group(scales, zeros, begin // GROUP * N + row, MIDDLE, HAS_ZEROS)
        following = tl.minimum(begin + 128, last)
        next_words = tl.load(start + following // 4)
        next_scale_n, next_zero_n = of_group(scales, zeros, following // GROUP * N + row, MIDDLE, HAS_ZEROS)
        w_nk = _widened(words, scale_n, zero_n, HAS_ZEROS, x.dtype, PDL)
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if tile == first_tile:
            wait_for_inputs(PDL)
        for column in range(begin, last + 128, 128):
            total = tl.dot(w_nk, x.load([first_m, column]).T, total)
            w_nk = _widened(next_words, next_scale_n, next_zero_n, HAS_ZEROS, x.dtype, PDL)
            following = tl.minimum(column + 256, last)
            next_words = tl.load(start + following // 4)
            next_scale_n, next_zero_n = of_group(scales, zeros, following // GROUP * N + row, MIDDLE, HAS_ZEROS)
        if HELPERS > 0:
            at = tile.to(tl.int64) * BLOCK_N * BLOCK_M + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M
            part = part_sums + at + tl.arange(0, BLOCK_M)[None, :]
            if helps:
                tl.store(part, total)
                tl.debug_barrier()  # all threads' sums are written before this program says so
                tl.atomic_add(arrived + tile, 1, sem="release")
            else:
                count = tl.atomic_add(arrived + tile, 0, sem="acquire")
                while count == 0:
                    count = tl.atomic_add(arrived + tile, 0, sem="acquire")
                total += tl.load(part, cache_modifier=".cg")
                tl.store(arrived + tile, 0)
        if not helps:
            m = first_m + tl.arange(0, BLOCK_M)
            store_sums(
                total, m, n, M, N, bias, out, keys, cached_values, slots, inverses, SPLITS, HAS_BIAS, ACTIVATION, CLIP,
                Q, KV, D,
            )  # fmt: skip
        tile += 1
