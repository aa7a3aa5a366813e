"""Linear layers whose weights have scales of groups, of 4 bits or 8 a value.

Values are widened in registers, by bits and not by conversions, and multiplied by the tensor cores. With few rows each
group's sums are multiplied by their scale in fp32; with more, the widened values are (on an H200 by the kernel of
`grouped_tiles.py`). Beyond that the weight is widened once, in memory, for cuBLAS.

Shapes: M rows, N output features, K columns (input features in the order of their groups), G groups; values [N, K] in
bytes, or [N, K / 4] in words of four columns, which are 32 apart; scales and zeros [G, N].
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hasten.ops.gpu.endings import Projection, store_sums, targets, widths
from hasten.ops.gpu.grouped_tiles import by_tiles
from hasten.ops.gpu.launch import (
    has_warp_groups,
    multiprocessors,
    overlapped,
    prefetch,
    shared_memory,
    start_next,
    wait_for_inputs,
)
from hasten.ops.gpu.widening import less, of_group, quarter, scaled
from hasten.ops.grouped import GroupedWeight
from hasten.ops.packed import PackedLinear


@triton.jit(do_not_specialize=["M"])
def _by_groups(
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
    PACKED: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLIP: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M rows with BLOCK_N output features; programs of the same features and other rows are neighbours.

    BLOCK_K columns at a time, of one group; of words, each quarter may be of another one. With SPLITS above 1, each
    split of K writes its own sums [SPLITS, M, N] in fp32; whoever reads them adds them up.
    """
    start_next(PDL)
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * (K // SPLITS)
    row = tl.where(n < N, n, 0)
    per_element: tl.constexpr = 4 if PACKED else 1
    whole: tl.constexpr = PACKED and GROUP % 128 == 0
    element = tl.arange(0, BLOCK_K // per_element)
    column = tl.arange(0, BLOCK_K if whole else BLOCK_K // per_element)
    start = values + row.to(tl.int64)[:, None] * (K // per_element) + begin // per_element
    if PDL and AHEAD:
        prefetch(start + tl.arange(0, AHEAD)[None, :] * (1024 // values.dtype.element_ty.primitive_bitwidth))
    wait_for_inputs(PDL)
    dtype: tl.constexpr = x.dtype.element_ty
    x_start = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * K + begin + column[None, :]
    v_start = start + element[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for offset in tl.range(0, K // SPLITS, BLOCK_K, num_stages=STAGES):
        read = tl.load(v_start + offset // per_element)
        x_mk = tl.load(x_start + offset)
        at = (begin + offset) // GROUP * N + row
        if PACKED:
            first, second = quarter(read, 0, dtype, PDL), quarter(read, 1, dtype, PDL)
            third, fourth = quarter(read, 2, dtype, PDL), quarter(read, 3, dtype, PDL)
        if whole:
            scale_n, zero_n = of_group(scales, zeros, at, MIDDLE, HAS_ZEROS)
            if SCALES_SUMS:
                sums = tl.dot(_side_by_side(first, second, third, fourth), x_mk.T)
                if HAS_ZEROS:
                    sums -= zero_n[:, None] * _sum(x_mk)[None, :]
                total += sums * scale_n[:, None]
            else:
                first, second = scaled(first, scale_n, zero_n, HAS_ZEROS), scaled(second, scale_n, zero_n, HAS_ZEROS)
                third, fourth = scaled(third, scale_n, zero_n, HAS_ZEROS), scaled(fourth, scale_n, zero_n, HAS_ZEROS)
                total = tl.dot(_side_by_side(first, second, third, fourth), x_mk.T, total)
        elif PACKED:
            total = _add(first, x_mk, total, scales, zeros, at, MIDDLE, HAS_ZEROS)
            at = (begin + offset + 32) // GROUP * N + row
            total = _add(second, tl.load(x_start + offset + 32), total, scales, zeros, at, MIDDLE, HAS_ZEROS)
            at = (begin + offset + 64) // GROUP * N + row
            total = _add(third, tl.load(x_start + offset + 64), total, scales, zeros, at, MIDDLE, HAS_ZEROS)
            at = (begin + offset + 96) // GROUP * N + row
            total = _add(fourth, tl.load(x_start + offset + 96), total, scales, zeros, at, MIDDLE, HAS_ZEROS)
        else:
            total = _add(less(read, MIDDLE, dtype), x_mk, total, scales, zeros, at, MIDDLE, HAS_ZEROS)
    store_sums(
        total, m, n, M, N, bias, out, keys, cached_values, slots, inverses, SPLITS, HAS_BIAS, ACTIVATION, CLIP, Q, KV, D
    )


@triton.jit
def _side_by_side(first, second, third, fourth):
    """Quarters [n, 32] as columns [n, 128] of a single product."""
    quarters = tl.join(tl.join(first, third), tl.join(second, fourth))
    return quarters.permute(0, 2, 3, 1).reshape([first.shape[0], 128])


@triton.jit
def _sum(x_mk):
    """Each row's sum."""
    return tl.sum(x_mk.to(tl.float32), 1)


@triton.jit
def _add(w_nk, x_mk, total, scales, zeros, at, MIDDLE: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """`total` and the product of columns of one group."""
    scale_n, zero_n = of_group(scales, zeros, at, MIDDLE, HAS_ZEROS)
    sums = tl.dot(w_nk, x_mk.T)
    if HAS_ZEROS:
        sums -= zero_n[:, None] * _sum(x_mk)[None, :]
    return total + sums * scale_n[:, None]


@triton.jit(do_not_specialize=["N"])
def _widen_groups(
    values,
    scales,
    zeros,
    out,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N rows of BLOCK_K columns in the type of `out`."""
    start_next(PDL)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    valid = (n < N) & (k < K)
    row = n.to(tl.int64)
    if PACKED:
        words = tl.load(values + row * (K // 4) + k // 128 * 32 + k % 32, valid, 0).to(tl.int32)
        value = ((words >> (k % 128 // 32 * 4)) & 15).to(tl.float32)
    else:
        value = tl.load(values + row * K + k, valid, 0).to(tl.float32)
    at = k // GROUP * N + n
    zero = tl.load(zeros + at, valid, 0).to(tl.float32) if HAS_ZEROS else MIDDLE
    value = (value - zero) * tl.load(scales + at, valid, 0.0).to(tl.float32)
    wait_for_inputs(PDL)  # kernels before this one may still use the memory of `out`
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), valid)


@dataclass(frozen=True)
class Cut:
    """How `_by_groups` is cut: rows and features a program, stages, warps, and whether it scales sums or weights."""

    block_m: int
    block_n: int
    stages: int
    warps: int
    scales_sums: bool


MOST_ROWS = 256
"""More rows are cuBLAS's, with a weight that is widened to 16 bits first."""
_FEW_ROWS = 64
_WIDEN_ROWS, _WIDEN_BLOCK = 4, 1024
_AHEAD = 2
"""Lines of 128 bytes of each row of the weight that are fetched before inputs may be read."""
_BLOCKS = (128, 64, 32)
"""Columns at a time, of one group."""


def pack_linear(weight_oh: GroupedWeight) -> PackedLinear:
    """A GPU reads it as it is, with scales in fp32: what has less than 4 bytes a thread is not fetched beforehand."""
    return PackedLinear(*weight_oh.shape, plain=None, grouped=replace(weight_oh, scales=weight_oh.scales.float()))


def serves(rows: int, dtype: torch.dtype, weight: GroupedWeight) -> bool:
    """Whether `product` is to be used for this number of rows of a type, and not a library."""
    return 0 < rows <= MOST_ROWS and _block(weight) is not None and dtype != torch.float32


def _block(weight: GroupedWeight) -> int | None:
    """Columns at a time; None where no block divides the groups."""
    block = next((block for block in _BLOCKS if weight.group_size % block == 0), None)
    return _BLOCKS[0] if weight.is_packed and block is not None else block


def widened(weight: GroupedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, its columns in their order: [o, k]."""
    features, columns = weight.shape[0], weight.num_columns
    out = weight.values.new_empty(features, columns, dtype=dtype)
    block = min(_WIDEN_BLOCK, triton.next_power_of_2(columns))
    _widen_groups[(triton.cdiv(features, _WIDEN_ROWS), triton.cdiv(columns, block))](
        *_tensors(weight), out, features, BLOCK_N=_WIDEN_ROWS, BLOCK_K=block, num_warps=4,
        PACKED=weight.is_packed, **_constants(weight), **overlapped(weight.values),
    )  # fmt: skip
    return out


def _tensors(weight: GroupedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.values, weight.scales, weight.values if weight.zeros is None else weight.zeros


def _constants(weight: GroupedWeight) -> dict[str, int]:
    return {
        "K": weight.num_columns,
        "GROUP": weight.group_size,
        "MIDDLE": weight.middle,
        "HAS_ZEROS": weight.zeros is not None,
    }


def product(
    x_th: Tensor,
    weight: GroupedWeight,
    bias_o: Tensor | None,
    activation: str | None,
    to: Projection | None,
    *,
    split: bool,
) -> Tensor:
    """[t, o] in the type of `x_th`, with `to` the queries alone; with `split` maybe [splits, t, o] in fp32."""
    x_tk = weight.columns.of(x_th)
    assert x_tk.is_contiguous()
    rows, features, columns = x_tk.shape[0], weight.shape[0], weight.num_columns
    device = x_tk.device.index
    block_k = _block(weight)
    assert block_k is not None
    cut = _cut(rows, split)
    splits = _splits(rows, features, columns // block_k, cut, multiprocessors(device)) if split else 1
    if splits > 1:
        out = x_tk.new_empty(splits, rows, features, dtype=torch.float32)
    else:
        out = x_tk.new_empty(rows, features if to is None else to.queries)
    keys, values, slots, inverses = targets(to, x_tk)
    grid = triton.cdiv(rows, cut.block_m) * triton.cdiv(features, cut.block_n), splits
    arguments = (
        *_tensors(weight), x_tk if bias_o is None else bias_o, out, keys, values, slots, inverses, rows, features
    )  # fmt: skip
    common = dict(
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, SPLITS=splits, HAS_BIAS=bias_o is not None, ACTIVATION=activation,
        num_warps=cut.warps, **_constants(weight), **widths(to), **overlapped(x_tk),
    )  # fmt: skip
    rows_bytes = 2 * block_k * cut.block_m
    whole = weight.is_packed and weight.group_size % block_k == 0
    if whole and not cut.scales_sums and has_warp_groups(device):
        room = shared_memory(device) - 2 * block_k * cut.block_n
        x_rows = TensorDescriptor.from_tensor(x_tk, [cut.block_m, block_k])
        by_tiles[grid](x_rows, *arguments, num_stages=max(2, min(cut.stages, room // rows_bytes)), **common)
        return out
    stage_bytes = rows_bytes + cut.block_n * block_k // (2 if weight.is_packed else 1)
    _by_groups[grid](
        x_tk, *arguments, PACKED=weight.is_packed, SCALES_SUMS=cut.scales_sums, BLOCK_K=block_k, AHEAD=_AHEAD,
        STAGES=max(2, min(cut.stages, shared_memory(device) // stage_bytes)), **common,
    )  # fmt: skip
    return out


def _cut(rows: int, split: bool) -> Cut:
    """Measured choices: docs/performance-log.md. Where columns may be split there are programs enough for wide ones.

    With more rows, weights are scaled once for all of them, so that sums need no registers of their own.
    """
    if rows > _FEW_ROWS:
        return Cut(max(128, triton.next_power_of_2(rows)), 128, 4, 8, scales_sums=False)
    block_m = max(16, triton.next_power_of_2(rows))
    stages = 4 if rows > 16 else 6 if split else 8
    return Cut(block_m, 128, stages, 8, scales_sums=True) if split else Cut(block_m, 64, stages, 4, scales_sums=True)


def _splits(rows: int, features: int, blocks: int, cut: Cut, processors: int) -> int:
    """Parts to cut the columns into, so that programs fill the device about twice, or once with many rows."""
    programs = triton.cdiv(rows, cut.block_m) * triton.cdiv(features, cut.block_n)
    wanted = (2 if rows <= 16 else 1) * processors // programs
    splits = 1
    while splits < min(wanted, 8) and blocks % (2 * splits) == 0:
        splits *= 2
    return splits
