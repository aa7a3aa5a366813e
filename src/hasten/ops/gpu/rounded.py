"""Linear layers whose weights and inputs both have 8 bits, and are multiplied as they are by the tensor cores.

Each row's inputs are rounded by a kernel of their own: to int8 or fp8 where the scheme says so, else to numbers of 15
bits, which are two int8 digits (`ops/rounding.py`). Sums are multiplied by the unit of their row and the scale of their
output feature. So a row's result does not depend on the rows next to it.

Shapes: M rows, N output features, K input features, D digits; weights [N, K], row by row, rounded inputs [M, D, K].
"""

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.ops.gpu.endings import Projection, store_sums, targets, widths
from hasten.ops.gpu.launch import multiprocessors, overlapped, prefetch, shared_memory, start_next, wait_for_inputs
from hasten.ops.gpu.row_rounding import padded, round_rows
from hasten.ops.packed import PackedLinear, QuantizedWeight
from hasten.ops.rounding import BASE, Inputs, multiplies

_BASE = tl.constexpr(BASE)


@triton.jit(do_not_specialize=["M"])
def _eight_bit(
    x,
    units,
    weight,
    scales,
    bias,
    out,
    keys,
    values,
    slots,
    inverses,
    M,
    N,
    WIDTH: tl.constexpr,
    DIGITS: tl.constexpr,
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

    With SPLITS above 1, each split of K writes its own sums [SPLITS, M, N] in fp32; whoever reads them adds them up.
    """
    start_next(PDL)
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * (WIDTH // SPLITS)
    k = begin + tl.arange(0, BLOCK_K)
    row = tl.where(n < N, n, 0).to(tl.int64)
    w_start = weight + row[:, None] * WIDTH + k[None, :]
    if PDL and AHEAD:
        line = begin + tl.arange(0, AHEAD) * 128
        prefetch(weight + row[:, None] * WIDTH + line[None, :])
    wait_for_inputs(PDL)
    in_rows = (m < M)[:, None]
    x_start = x + m.to(tl.int64)[:, None] * (DIGITS * WIDTH) + k[None, :]
    dtype: tl.constexpr = tl.int32 if weight.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype)
    low = tl.zeros([BLOCK_N, BLOCK_M], dtype)
    for offset in tl.range(0, WIDTH // SPLITS, BLOCK_K, num_stages=STAGES):
        w_nk = tl.load(w_start + offset)
        total = tl.dot(w_nk, tl.load(x_start + offset, in_rows, 0.0).T, total, out_dtype=dtype)
        if DIGITS == 2:
            low = tl.dot(w_nk, tl.load(x_start + (offset + WIDTH), in_rows, 0.0).T, low, out_dtype=dtype)
    sums = total.to(tl.float32)
    if DIGITS == 2:
        sums = sums * _BASE + low.to(tl.float32)
    sums *= tl.load(scales + n, n < N, 0.0)[:, None] * tl.load(units + m, m < M, 0.0)[None, :]
    store_sums(sums, m, n, M, N, bias, out, keys, values, slots, inverses, SPLITS, HAS_BIAS, ACTIVATION, CLIP, Q, KV, D)


@triton.jit(do_not_specialize=["N"])
def _widen(
    values,
    scales,
    out,
    N,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N rows of a quantized weight, which lie WIDTH values apart, in the type of `out`."""
    start_next(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = (n < N)[:, None] & (k < K)[None, :]
    row = n.to(tl.int64)[:, None]
    value = tl.load(values + row * WIDTH + k[None, :], valid, 0).to(tl.float32)
    value *= tl.load(scales + n, n < N, 0.0)[:, None]
    wait_for_inputs(PDL)  # kernels before this one may still use the memory of `out`
    tl.store(out + row * K + k[None, :], value.to(out.dtype.element_ty), valid)


@dataclass(frozen=True)
class Cut:
    """How `_eight_bit` is cut: rows and features a program, input features at a time, stages, warps."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


_AHEAD = 2
"""Lines of 128 bytes of each row of the weight that are fetched before inputs are rounded."""
MOST_ROWS_IN_DIGITS = 256
"""More rows are cuBLAS's, with a weight that is widened to 16 bits first."""
MOST_ROWS_IN_FP8 = 128
"""More rows are cuBLAS's, whose products are never cut into parts."""
MOST_ROWS_OF_PARTS_IN_FP8 = 256
"""The same of products that may be cut into parts."""
_LARGE_WEIGHT = 1 << 28
"""Elements of a weight that is never widened: a head would take gigabytes."""
_FEW_ROWS = 64
_WIDEN_ROWS, _WIDEN_BLOCK = 4, 1024
_BUSY = 0.85
"""What fraction of the multiprocessors' time must have a program for a larger tile to be better."""


def pack_linear(weight_oh: QuantizedWeight) -> PackedLinear:
    """Rows as they are, or with zeros at their ends where the tensor cores need them.

    UnsupportedError for fp8 on a GPU that does not multiply it.
    """
    if not multiplies(weight_oh.values.dtype, weight_oh.values.device):
        raise UnsupportedError(
            "weights in fp8 need a GPU of compute capability 8.9 or later; give int8, or full precision"
        )
    values, features = weight_oh.values, weight_oh.shape[1]
    if padded(features) > features:
        values = values.new_zeros(values.shape[0], padded(features))
        values[:, :features] = weight_oh.values
    return PackedLinear(*weight_oh.shape, plain=values, scales=weight_oh.scales, inputs=weight_oh.inputs)


def serves(rows: int, dtype: torch.dtype, weight: PackedLinear, *, split: bool) -> bool:
    """Whether `product` is to be used for this number of rows of a type, and not a library."""
    if weight.inputs is None:
        large = weight.out_features * weight.in_features >= _LARGE_WEIGHT
        return dtype != torch.float32 and (large or rows <= MOST_ROWS_IN_DIGITS) and rows > 0
    most = MOST_ROWS_OF_PARTS_IN_FP8 if split else MOST_ROWS_IN_FP8
    return rows > 0 and (rows <= most or weight.inputs == torch.int8 or weight.out_features % 16 > 0)


def widened(weight: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, [o, h]."""
    assert weight.plain is not None
    features, width = weight.out_features, weight.in_features
    out = weight.plain.new_empty(features, width, dtype=dtype)
    block = min(_WIDEN_BLOCK, triton.next_power_of_2(width))
    _widen[(triton.cdiv(features, _WIDEN_ROWS), triton.cdiv(width, block))](
        weight.plain, weight.scales, out, features, K=width, WIDTH=weight.plain.shape[1],
        BLOCK_N=_WIDEN_ROWS, BLOCK_K=block, num_warps=4, **overlapped(weight.plain),
    )  # fmt: skip
    return out


def library_product(x_th: Inputs, weight: PackedLinear, bias_o: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` of many rows by cuBLAS: [t, o]."""
    assert weight.plain is not None
    assert weight.scales is not None
    if x_th.shape[0] == 0:
        return weight.scales.new_empty(0, weight.out_features, dtype=x_th.dtype)
    numbers, units_t = round_rows(x_th, weight.inputs)
    within = bias_o if x_th.dtype != torch.float32 else None
    out_to = torch._scaled_mm(
        numbers,
        weight.plain.t(),
        scale_a=units_t.unsqueeze(1),
        scale_b=weight.scales.unsqueeze(0),
        bias=within,
        out_dtype=x_th.dtype,
        use_fast_accum=True,
    )
    return out_to if bias_o is None or within is not None else out_to.add_(bias_o)


def product(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    to: Projection | None,
    *,
    split: bool,
) -> Tensor:
    """[t, o] in the type of `x_th`, with `to` the queries alone; with `split` maybe [splits, t, o] in fp32."""
    assert weight.plain is not None
    assert weight.scales is not None
    rows, features, width = x_th.shape[0], weight.out_features, weight.plain.shape[1]
    numbers, units_t = round_rows(x_th, weight.inputs)
    digits = numbers.shape[1] // width
    device = numbers.device.index
    limits = {"processors": multiprocessors(device), "shared": shared_memory(device)}
    cut, splits = _cut(rows, features, width, digits, split=split, **limits)
    if splits > 1:
        out = units_t.new_empty(splits, rows, features)
    else:
        out = units_t.new_empty(rows, features if to is None else to.queries, dtype=x_th.dtype)
    keys, values, slots, inverses = targets(to, out)
    _eight_bit[(triton.cdiv(rows, cut.block_m) * triton.cdiv(features, cut.block_n), splits)](
        numbers, units_t, weight.plain, weight.scales, out if bias_o is None else bias_o, out, keys, values, slots,
        inverses, rows, features, WIDTH=width, DIGITS=digits,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, SPLITS=splits, STAGES=cut.stages,
        HAS_BIAS=bias_o is not None, ACTIVATION=activation, **widths(to),
        AHEAD=_AHEAD, num_warps=cut.warps, **overlapped(numbers),
    )  # fmt: skip
    return out


def _cut(
    rows: int, features: int, width: int, digits: int, *, split: bool, processors: int, shared: int
) -> tuple[Cut, int]:
    """The cut that keeps all multiprocessors busy to the end, in as many stages as find room; and parts of K."""
    fitting = []
    for cut in _cuts(rows, digits):
        while width % cut.block_k:
            cut = replace(cut, block_k=cut.block_k // 2)
        programs = triton.cdiv(rows, cut.block_m) * triton.cdiv(features, cut.block_n)
        splits = _splits(rows, width // cut.block_k, processors // programs) if split else 1
        fitting.append((cut, splits))
        rounds = programs * splits / processors
        if rounds / math.ceil(rounds) >= _BUSY:
            break
    else:
        cut, splits = fitting[0 if digits > 1 and rows <= _FEW_ROWS else -1]  # measured: docs/performance-log.md
    stage = (cut.block_n + digits * cut.block_m) * cut.block_k
    return replace(cut, stages=max(2, min(cut.stages, shared // stage))), splits


def _cuts(rows: int, digits: int) -> tuple[Cut, ...]:
    """Those for a number of rows, best first. No program has fewer than the 64 features of a warp group's product."""
    if rows <= 32:
        return (Cut(16 if rows <= 16 else 32, 64, 256, 4, 4),)
    if rows <= 64:
        return Cut(64, 128, 128, 5, 8), Cut(64, 64, 128, 5, 4)
    return Cut(128, 128, 128, 4, 8), Cut(128, 64, 128, 4, 4 * digits)


def _splits(rows: int, steps: int, room: int) -> int:
    """Parts to cut the input features into, so that programs fill the device about once, or twice with few rows."""
    wanted = min(2 * room if rows <= 16 else room, 8)
    splits = 1
    while splits < wanted and steps % (2 * splits) == 0:
        splits *= 2
    return splits
