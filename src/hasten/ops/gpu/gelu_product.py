"""Products of many rows that end with GELU in its exact form, which the library does not compute.

A tile's result is computed and stored by one of two programs on a multiprocessor while the other one multiplies, so
that neither GELU nor a further pass over memory costs more than a few percent.
Shapes: M rows, N output features, K input features; weights [N, K], row by row.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.gpu.library import with_room
from hasten.ops.packed import PackedLinear

_LEAST_ROWS = 8192
"""Fewer are too few tiles for the last round of programs not to show."""
_BLOCK_M, _BLOCK_N, _BLOCK_K, _STAGES, _WARPS = 128, 128, 64, 3, 4
_GROUP = 8
"""Tiles of rows that lie next to each other: their inputs and weights are in the second-level cache together."""


@triton.jit
def gelu(x):
    """`x` times the normal distribution's function, by a logistic function of an odd polynomial.

    It is at most 3.1e-6 from the exact one, less than what rounding to 16 bits changes. The coefficients are a minimax
    fit of our own to the logarithm of the odds, which the polynomial's argument is.
    """
    square = x * x
    odds = 2.2381676941317017e-06 * square - 6.1161868840591e-05
    odds = odds * square - 0.00024972299650006613
    odds = odds * square + 0.07293758151511721
    odds = odds * square + 1.5956562720866845
    return x / (1.0 + tl.exp2(x * odds * -1.4426950408889634))


@triton.jit
def _finished(sums, bias, n, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        sums += tl.load(bias + n).to(tl.float32)[None, :]
    return gelu(sums)


@triton.jit
def _gelu_product(
    x,
    weight,
    out,
    bias,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of `gelu(x @ weight.T + bias)`; `x`, `weight` and `out` describe tensors, `out` half a tile."""
    start_next(PDL)
    tiles_n: tl.constexpr = N // BLOCK_N
    tile, tiles_m = tl.program_id(0), tl.cdiv(rows, BLOCK_M)
    first = tile // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    at_m = (first + tile % (GROUP * tiles_n) % size) * BLOCK_M
    at_n = tile % (GROUP * tiles_n) // size * BLOCK_N
    wait_for_inputs(PDL)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        sums = tl.dot(x.load([at_m, k]), weight.load([at_n, k]).T, sums)
    half: tl.constexpr = BLOCK_N // 2
    # half a tile at a time leaves room for two programs' inputs
    left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, half)), (0, 2, 1)))
    n = at_n + tl.arange(0, half)
    out.store([at_m, at_n], _finished(left, bias, n, HAS_BIAS).to(out.dtype))
    out.store([at_m, at_n + half], _finished(right, bias, n + half, HAS_BIAS).to(out.dtype))


@cache
def _has_copy_engine(index: int | None) -> bool:
    """Whether a device copies tiles by itself and multiplies them from shared memory, as an H200 does."""
    return index is None or torch.cuda.get_device_capability(index)[0] == 9


def serves(x_th: Tensor, weight: PackedLinear) -> bool:
    """Whether this product is the one to take."""
    plain = weight.plain
    if plain is None or weight.scales is not None or weight.inputs is not None or weight.fixed_order:
        return False
    whole = weight.out_features % _BLOCK_N == 0 and weight.in_features % _BLOCK_K == 0
    is_narrow = x_th.dtype == plain.dtype and x_th.dtype != torch.float32
    contiguous = x_th.is_contiguous() and plain.is_contiguous()
    many = x_th.shape[0] >= _LEAST_ROWS
    return many and whole and is_narrow and contiguous and _has_copy_engine(x_th.device.index)


def gelu_product(x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None) -> Tensor:
    """`gelu(x @ weight.T + bias)`: [t, o] in the type of `x_th`, where `serves`."""
    rows, features = x_th.shape[0], weight.out_features
    assert weight.plain is not None
    out_to = with_room(x_th, rows, features)
    _gelu_product[(triton.cdiv(rows, _BLOCK_M) * (features // _BLOCK_N),)](
        TensorDescriptor.from_tensor(x_th, [_BLOCK_M, _BLOCK_K]),
        TensorDescriptor.from_tensor(weight.plain, [_BLOCK_N, _BLOCK_K]),
        TensorDescriptor.from_tensor(out_to, [_BLOCK_M, _BLOCK_N // 2]),
        x_th if bias_o is None else bias_o,
        rows,
        N=features,
        K=weight.in_features,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        GROUP=_GROUP,
        STAGES=_STAGES,
        HAS_BIAS=bias_o is not None,
        num_warps=_WARPS,
        **overlapped(x_th),
    )
    return out_to
