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
    K: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
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
    """
    start_next(PDL)
    tiles = tl.cdiv(M, BLOCK_M)
    first_m = tl.program_id(0) % tiles * BLOCK_M
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, last = tl.program_id(1) * (K // SPLITS), (tl.program_id(1) + 1) * (K // SPLITS) - 128
    row = tl.where(n < N, n, 0)
    start = values + row.to(tl.int64)[:, None] * (K // 4) + tl.arange(0, 32)[None, :]
    words = tl.load(start + begin // 4)
    scale_n, zero_n = of_group(scales, zeros, begin // GROUP * N + row, MIDDLE, HAS_ZEROS)
    following = tl.minimum(begin + 128, last)
    next_words = tl.load(start + following // 4)
    next_scale_n, next_zero_n = of_group(scales, zeros, following // GROUP * N + row, MIDDLE, HAS_ZEROS)
    w_nk = _widened(words, scale_n, zero_n, HAS_ZEROS, x.dtype, PDL)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    wait_for_inputs(PDL)
    for offset in range(0, K // SPLITS, 128):
        total = tl.dot(w_nk, x.load([first_m, begin + offset]).T, total)
        w_nk = _widened(next_words, next_scale_n, next_zero_n, HAS_ZEROS, x.dtype, PDL)
        following = tl.minimum(begin + offset + 256, last)
        next_words = tl.load(start + following // 4)
        next_scale_n, next_zero_n = of_group(scales, zeros, following // GROUP * N + row, MIDDLE, HAS_ZEROS)
    m = first_m + tl.arange(0, BLOCK_M)
    store_sums(
        total, m, n, M, N, bias, out, keys, cached_values, slots, inverses, SPLITS, HAS_BIAS, ACTIVATION, CLIP, Q, KV, D
    )
