"""Products of many rows that end with GELU in its exact form, which the library does not compute.

A program computes tile after tile, so that the inputs of the next are on their way while it ends the one before.
Shapes: M rows, N output features, K input features; weights [N, K], row by row.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hasten.ops.gpu.activations import gelu_by_odds
from hasten.ops.gpu.launch import multiprocessors, overlapped, shared_memory, start_next, wait_for_inputs
from hasten.ops.gpu.library import with_room
from hasten.ops.packed import PackedLinear

_LEAST_ROWS = 16_384
"""Of fewer rows it was not measured."""
_BLOCK_M, _BLOCK_N, _BLOCK_K, _STAGES, _WARPS = 128, 256, 64, 4, 8
_SHARED_BYTES = 2 * (_STAGES * (_BLOCK_M + _BLOCK_N) * _BLOCK_K + _BLOCK_M * _BLOCK_N // 2)
"""What a program has in shared memory: inputs of each stage, and half a tile of results; and a little more."""
_GROUP = 8
"""Tiles of rows that lie next to each other: their inputs and weights are in the second-level cache together."""
_EVEN = 0.9
"""How busy multiprocessors are over all rounds of tiles, at least."""


@triton.jit
def _finished(sums, bias, n, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        sums += tl.load(bias + n).to(tl.float32)[None, :]
    return gelu_by_odds(sums)


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
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of `gelu(x @ weight.T + bias)`; `x`, `weight` and `out` describe tensors, `out` by half tiles."""
    start_next(PDL)
    tiles_n: tl.constexpr = N // BLOCK_N
    half: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(rows, BLOCK_M)
    wait_for_inputs(PDL)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        size = min(tiles_m - first, GROUP)
        at_m = (first + tile % (GROUP * tiles_n) % size) * BLOCK_M
        at_n = tile % (GROUP * tiles_n) // size * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            sums = tl.dot(x.load([at_m, k]), weight.load([at_n, k]).T, sums)
        # half a tile at a time, as there is no room for a whole one beside the inputs of four stages
        left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, half)), (0, 2, 1)))
        n = at_n + tl.arange(0, half)
        out.store([at_m, at_n], _finished(left, bias, n, HAS_BIAS).to(out.dtype))
        out.store([at_m, at_n + half], _finished(right, bias, n + half, HAS_BIAS).to(out.dtype))


@cache
def _fits(index: int | None) -> bool:
    """Whether a device copies tiles by itself, multiplies them from shared memory, and has enough of it."""
    if index is None:
        return True
    return torch.cuda.get_device_capability(index)[0] == 9 and shared_memory(index) > _SHARED_BYTES


def serves(x_th: Tensor, weight: PackedLinear) -> bool:
    """Whether this product is the one to take."""
    plain = weight.plain
    if plain is None or weight.scales is not None or weight.inputs is not None or weight.fixed_order:
        return False
    if x_th.shape[0] < _LEAST_ROWS or weight.out_features % _BLOCK_N or weight.in_features % _BLOCK_K:
        return False
    is_narrow = x_th.dtype == plain.dtype and x_th.dtype != torch.float32
    if not (is_narrow and x_th.is_contiguous() and plain.is_contiguous() and _fits(x_th.device.index)):
        return False
    rounds = _tiles(x_th, weight) / multiprocessors(x_th.device.index)
    return rounds / math.ceil(rounds) >= _EVEN


def _tiles(x_th: Tensor, weight: PackedLinear) -> int:
    return triton.cdiv(x_th.shape[0], _BLOCK_M) * (weight.out_features // _BLOCK_N)


def gelu_product(x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None) -> Tensor:
    """`gelu(x @ weight.T + bias)`: [t, o] in the type of `x_th`, where `serves`."""
    rows, features = x_th.shape[0], weight.out_features
    assert weight.plain is not None
    out_to = with_room(x_th, rows, features)
    programs = min(_tiles(x_th, weight), multiprocessors(x_th.device.index))
    _gelu_product[(programs,)](
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
        PROGRAMS=programs,
        STAGES=_STAGES,
        HAS_BIAS=bias_o is not None,
        num_warps=_WARPS,
        **overlapped(x_th),
    )
    return out_to
