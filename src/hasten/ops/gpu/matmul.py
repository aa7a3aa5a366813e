"""Linear layers of few rows, whose time is that of reading their weights.

Quantized weights are multiplied by the kernels of `quantized.py`. Shapes: M rows, N output features, K input features;
weights [N, K], row by row.
"""

import math
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
import triton
from torch import Tensor

from hasten.ops import reference
from hasten.ops.cache_scales import CacheScales
from hasten.ops.gpu import gelu_product, grouped, library, quantized, rounded, row_rounding
from hasten.ops.gpu.cache import write_cache
from hasten.ops.gpu.compiling import compiles_only
from hasten.ops.gpu.endings import Projection, targets, widths
from hasten.ops.gpu.heads import store_heads
from hasten.ops.gpu.launch import multiprocessors, overlapped, shared_memory
from hasten.ops.gpu.matmul_kernels import activate, matvec, skinny
from hasten.ops.grouped import GroupedWeight
from hasten.ops.heads import HeadTransform
from hasten.ops.order import order_is_fixed
from hasten.ops.packed import PackedLinear, QuantizedWeight, Weight
from hasten.ops.reference import split_heads
from hasten.ops.rounding import Inputs


@dataclass(frozen=True)
class Cut:
    """How `skinny` is cut: features a program, input features at a time, stages, warps."""

    block_n: int
    block_k: int
    stages: int
    warps: int


_MATVEC_ROWS, _MATVEC_BLOCK, _MATVEC_WARPS = 2, 2048, 4
MOST_ROWS = 64
"""More rows than that are cuBLAS's."""
_AHEAD = 2
"""Lines of 128 bytes of each row of the weight that `skinny` fetches before it may read its input."""
_WIDE, _NARROW = Cut(64, 128, 4, 4), Cut(32, 128, 6, 4)
_MIDDLE, _TALL = Cut(64, 128, 3, 4), Cut(128, 64, 5, 8)
_ALONE_FEW, _ALONE = Cut(64, 128, 6, 4), Cut(64, 128, 5, 4)
"""Of up to 32 rows and of more, where no multiprocessor has two programs: all of its shared memory is one's."""
_FEW_ALONE = 0.3
"""Share of multiprocessors with a program from which that is better for up to 16 rows than narrow programs."""
_EVEN_FEW, _EVEN = 0.8, 0.9
"""How busy multiprocessors are over all rounds of programs, from which on these are not too uneven: with up to 16 rows,
whose programs go in twos or more to a multiprocessor, and with more."""
_MANY, _FULL = Cut(128, 64, 4, 8), Cut(64, 32, 2, 4)
"""Of products in a fixed order: of many rows, and in fp32."""
_MAX_SPLIT_ROWS = 512
"""Of a product in a fixed order; with more, a program adds up all parts itself."""
_GROUP = 8
"""Tiles of many rows that lie next to each other."""


def pack_linear(weight_oh: Weight, shared: bool) -> PackedLinear:
    """A GPU reads weights as they are, row by row."""
    if isinstance(weight_oh, QuantizedWeight):
        return rounded.pack_linear(weight_oh)
    if isinstance(weight_oh, GroupedWeight):
        return grouped.pack_linear(weight_oh)
    features, width = weight_oh.shape
    plain = weight_oh if shared else weight_oh.contiguous()
    return PackedLinear(features, width, plain=plain, fixed_order=order_is_fixed())


def _operands(x_th: Tensor, weight: PackedLinear) -> tuple[Tensor, Tensor]:
    """Inputs and the weight for cuBLAS; a weight that is widened takes memory that is free again after the product."""
    if weight.grouped is not None:
        return weight.grouped.columns.of(x_th), grouped.widened(weight.grouped, x_th.dtype)
    assert weight.plain is not None
    return x_th, weight.plain if weight.scales is None else rounded.widened(weight, x_th.dtype)


def _library(x_th: Inputs, weight: PackedLinear, bias_o: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` by cuBLAS."""
    if weight.inputs is not None:
        return rounded.library_product(x_th, weight, bias_o)
    assert isinstance(x_th, Tensor)
    x_tk, weight_ok = _operands(library.given(x_th), weight)
    if compiles_only():
        return x_th.new_empty(x_th.shape[0], weight.out_features)
    return F.linear(x_tk, weight_ok, bias_o)[: x_th.shape[0]]


@overload
def linear(
    x_th: Inputs, weight: PackedLinear, bias_o: Tensor | None, activation: str | None, reader: None = None
) -> Tensor: ...


@overload
def linear(
    x_th: Inputs, weight: PackedLinear, bias_o: Tensor | None, activation: str | None, reader: PackedLinear | None
) -> Inputs: ...


def linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    reader: PackedLinear | None = None,
) -> Inputs:
    """See `hasten.ops.linear`."""
    if weight.fixed_order:
        product_to = _by_library(x_th, weight, bias_o)
        if product_to is None:
            return _product(x_th, weight, bias_o, activation, None, splits=1)
        return product_to if activation is None else _activated(product_to, activation)
    if _serves(x_th, weight):
        return _product(x_th, weight, bias_o, activation, None, splits=1)
    fused = activation in ("gelu_tanh", "relu") and weight.inputs is None and x_th.dtype != torch.float32
    if fused and bias_o is not None:  # the two that cuBLAS computes within its product
        assert isinstance(x_th, Tensor)
        x_tk, weight_ok = _operands(library.given(x_th), weight)
        if compiles_only():
            return x_th.new_empty(x_th.shape[0], weight.out_features)
        use_gelu = activation == "gelu_tanh"
        return torch._addmm_activation(bias_o, x_tk, weight_ok.t(), use_gelu=use_gelu)[: x_th.shape[0]]
    if activation == "gelu" and isinstance(x_th, Tensor) and gelu_product.serves(x_th, weight):
        return gelu_product.gelu_product(x_th, weight, bias_o)
    out_to = _library(x_th, weight, bias_o)
    if activation is None:
        return out_to
    if reader is not None and row_rounding.rounds(reader, weight):
        return row_rounding.activated_rows(out_to, reader, activation)
    if activation == "gelu" and out_to.dtype != torch.float32 and out_to.is_contiguous():
        return _activated(out_to, "gelu_by_odds")  # a quarter less time than torch's
    return reference.activated(out_to, activation)


def _activated(out_to: Tensor, activation: str) -> Tensor:
    activate[(triton.cdiv(out_to.numel(), 1024),)](
        out_to, out_to.numel(), ACTIVATION=activation, BLOCK=1024, num_warps=4, **overlapped(out_to)
    )
    return out_to


def _by_library(x_th: Inputs, weight: PackedLinear, bias_o: Tensor | None, splits: int = 1) -> Tensor | None:
    """A product of many rows by the library, where that has the bits of `_product`; else None."""
    if x_th.shape[0] <= (MOST_ROWS if splits == 1 else _MAX_SPLIT_ROWS) or x_th.dtype == torch.float32:
        return None
    assert weight.plain is not None
    assert isinstance(x_th, Tensor)

    def own(rows_th: Tensor) -> Tensor:
        return _product(rows_th, weight, bias_o, None, None, splits=splits)

    if splits > 1:
        return library.summed(x_th, weight.plain, splits, own)
    return library.product(x_th, weight.plain, bias_o, own)


def linear_parts(x_th: Inputs, weight: PackedLinear, *, whole: bool = False) -> Tensor:
    """`x @ weight.T`: [t, o], or [parts, t, o] in fp32 to be added up, where few rows leave the device idle else.

    `whole`: in a fixed order the parts of all rows are added up at once, as a sum of two products wants its second.
    """
    if weight.fixed_order:
        assert isinstance(x_th, Tensor)
        splits = 1 if whole or x_th.dtype == torch.float32 else _splits(16, weight)
        product_to = _by_library(x_th, weight, None, splits)
        return _product(x_th, weight, None, None, None, splits=splits) if product_to is None else product_to
    if not _serves(x_th, weight, split=True):
        return _library(x_th, weight, None)
    if quantized.holds(weight):
        return quantized.product(x_th, weight, None, None, None, split=True)
    assert isinstance(x_th, Tensor)
    return _product(x_th, weight, None, None, None, splits=_splits(x_th.shape[0], weight))


def linear_into(x_th: Tensor, weight: PackedLinear, out_to: Tensor) -> None:
    """See `hasten.ops.linear_into`."""
    assert weight.plain is not None
    torch.mm(x_th, weight.plain.t(), out=out_to)


def project(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform | None = None,
    *,
    clip: float | None = None,
    scales: CacheScales | None = None,
) -> Tensor:
    """See `hasten.ops.project`."""
    head_size = key_cache.shape[3]
    if transform is not None:
        if transform.only_turns and takes_pairs(x_th, weight):
            turn = transform.positions_t, transform.table_pr, transform.interleaved
            to = Projection(num_heads * head_size, key_cache, value_cache, slots_t, clip, scales, *turn)
            return _product(x_th, weight, bias_o, None, to, splits=1).unflatten(1, (num_heads, head_size))
        qkv_to = reference.clipped(linear(x_th, weight, bias_o, None), clip)
        caches = key_cache, value_cache
        fixed = weight.fixed_order
        return store_heads(qkv_to, *caches, slots_t, num_heads, transform, scales=scales, fixed_order=fixed)
    if weight.fixed_order:
        product_to = _by_library(x_th, weight, bias_o)
    else:
        served = _serves(x_th, weight)
        product_to = None if served else _library(x_th, weight, bias_o)
    if product_to is None:
        to = Projection(num_heads * head_size, key_cache, value_cache, slots_t, clip, scales)
        return _product(x_th, weight, bias_o, None, to, splits=1).unflatten(1, (num_heads, head_size))
    query_tnd, key_tmd, value_tmd = split_heads(reference.clipped(product_to, clip), num_heads, key_cache)
    write_cache(key_tmd, value_tmd, key_cache, value_cache, slots_t, scales=scales)
    return query_tnd


def project_consecutive(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform | None = None,
    *,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `hasten.ops.project_consecutive`."""
    if transform is None and not weight.fixed_order and not _serves(x_th, weight):
        qkv_to = reference.clipped(_library(x_th, weight, bias_o), clip)
        query_tnd, key_tmd, value_tmd = split_heads(qkv_to, num_heads, key_cache)
        return query_tnd, key_tmd.unsqueeze(1), value_tmd.unsqueeze(1)
    operands = (x_th, weight, bias_o, key_cache, value_cache, slots_t, num_heads, transform)
    return project(*operands, clip=clip), key_cache, value_cache


def _serves(x_th: Inputs, weight: PackedLinear, *, split: bool = False) -> bool:
    """Whether these kernels are the ones to take; `split`: for a product that may be cut into parts."""
    rows = x_th.shape[0]
    if quantized.holds(weight):
        return quantized.serves(rows, x_th.dtype, weight, split=split)
    few = rows == 1 or (1 < rows <= MOST_ROWS and weight.in_features % _WIDE.block_k == 0)
    return few and x_th.dtype != torch.float32


def takes_pairs(x_th: Inputs, weight: PackedLinear) -> bool:
    """Whether a product of these kernels can end with pairs of output features."""
    own = weight.plain is not None and weight.scales is None and not weight.fixed_order
    return own and 0 < x_th.shape[0] <= MOST_ROWS and _serves(x_th, weight)


def gated_pairs(x_th: Inputs, weight: PackedLinear, bias_o: Tensor | None, gate: str) -> Tensor:
    """`ops.gated_linear` as the ending of one product, where `takes_pairs`."""
    return _product(x_th, weight, bias_o, gate, None, splits=1, gated=True)


def _splits(rows: int, weight: PackedLinear) -> int:
    """Parts to cut the input features into, so that programs fill the device about twice, or once with many rows."""
    if rows == 1:
        return 1
    wanted = (256 if rows <= 32 else 128) // triton.cdiv(weight.out_features, _WIDE.block_n)
    splits = 1
    while splits < min(wanted, 8) and weight.in_features % (2 * splits * _WIDE.block_k) == 0:
        splits *= 2
    return splits


def _cut(rows: int, features: int, splits: int, multiprocessors: int) -> Cut:
    """The cut that keeps all multiprocessors busy to the end; measured choices: docs/performance-log.md."""
    if splits > 1:
        return _WIDE
    busy = triton.cdiv(features, _WIDE.block_n) / multiprocessors
    if busy <= 1 and (rows > 16 or busy >= _FEW_ALONE):
        return _ALONE_FEW if rows <= 32 else _ALONE
    first = _TALL if rows > 32 else _WIDE
    rounds = triton.cdiv(features, first.block_n) / multiprocessors
    if rounds > 4 or rounds / math.ceil(rounds) >= (_EVEN_FEW if rows <= 16 else _EVEN):
        return first
    return _NARROW if rows <= 16 else _MIDDLE


def _stages(cut: Cut, block_m: int, shared: int) -> int:
    """The cut's stages, or as many as fit into shared memory: each has a part of both operands, in two bytes."""
    return max(1, min(cut.stages, shared // (2 * (cut.block_n + block_m) * cut.block_k)))


@dataclass(frozen=True)
class _Form:
    """A program of `skinny`, and its options."""

    cut: Cut
    block_m: int
    stages: int
    segments: int = 1
    group: int = 0


def _form(x_th: Tensor, weight: PackedLinear, splits: int) -> _Form:
    rows, device = x_th.shape[0], x_th.device.index
    limits = multiprocessors(device), shared_memory(device)
    if weight.fixed_order and (rows > MOST_ROWS or x_th.dtype == torch.float32):
        return _fixed_form(rows, splits, x_th.dtype, limits[1])
    block_m = max(16, triton.next_power_of_2(rows))
    cut = _cut(rows, weight.out_features, splits, limits[0])
    return _Form(cut, block_m, _stages(cut, block_m, limits[1]))


def _fixed_form(rows: int, splits: int, dtype: torch.dtype, shared: int) -> _Form:
    """Of many rows, or in fp32: tiles differ, but every sum goes through the input features in the same order."""
    if dtype == torch.float32:
        return _Form(_FULL, 16 if rows <= 16 else MOST_ROWS, _FULL.stages, group=_GROUP)
    segments = splits if rows > _MAX_SPLIT_ROWS else 1
    # sums of two segments are in registers at once
    block_m = 128 if rows <= 128 or segments > 1 else 256
    return _Form(_MANY, block_m, _stages(_MANY, block_m, shared), segments, _GROUP)


def _product(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    to: Projection | None,
    splits: int,
    *,
    gated: bool = False,
) -> Tensor:
    """With `gated`, `activation` is that of the gate, and half as many features come out."""
    if quantized.holds(weight):
        return quantized.product(x_th, weight, bias_o, activation, to, split=False)
    assert isinstance(x_th, Tensor)
    rows, features, width = x_th.shape[0], weight.out_features, weight.in_features
    assert x_th.is_contiguous()
    form = _form(x_th, weight, splits)
    grid_splits = splits // form.segments
    if splits > 1:
        out = x_th.new_empty(grid_splits, rows, features, dtype=torch.float32)
    else:
        out = x_th.new_empty(rows, to.queries if to is not None else features // 2 if gated else features)
    assert weight.plain is not None
    turn = (x_th, x_th) if to is None or to.table_pr is None else (to.positions_t, to.table_pr)
    arguments = (x_th, weight.plain, x_th if bias_o is None else bias_o, out, *targets(to, x_th), *turn)
    common = dict(
        K=width,
        HAS_BIAS=bias_o is not None,
        ACTIVATION=activation,
        **widths(to),
        PAIRS="gate" if gated else None if to is None else to.pairs,
        R=0 if to is None or to.table_pr is None else to.table_pr.shape[1],
        **overlapped(x_th),
    )
    if rows == 1 and not weight.fixed_order:
        block = min(_MATVEC_BLOCK, triton.next_power_of_2(width))
        matvec[(triton.cdiv(features, _MATVEC_ROWS),)](
            *arguments, features, ROWS=_MATVEC_ROWS, BLOCK_K=block, num_warps=_MATVEC_WARPS, **common
        )
        return out
    cut, tiles = form.cut, triton.cdiv(rows, form.block_m)
    skinny[(tiles * triton.cdiv(features, cut.block_n), grid_splits)](
        *arguments, rows, features,
        BLOCK_M=form.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, SPLITS=grid_splits, SEGMENTS=form.segments,
        STAGES=form.stages, GROUP=form.group,
        ROUNDED=weight.fixed_order and activation is not None,
        PRECISION="ieee" if x_th.dtype == torch.float32 else None, AHEAD=_AHEAD, num_warps=cut.warps, **common,
    )  # fmt: skip
    return out
