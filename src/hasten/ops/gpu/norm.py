"""Layer and RMS norm, and the sums that come before it: embedding rows, split matrix products, bias and residual.

Shapes: t tokens, h hidden. One program a row.
"""

from typing import Any, overload

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.exchange import exchange_norm
from hasten.ops.gpu.launch import multiprocessors, overlapped, row_warps, start_next, wait_for_inputs
from hasten.ops.gpu.library import with_room
from hasten.ops.gpu.quantized import rounding_for
from hasten.ops.gpu.row_rounding import store_rounded
from hasten.ops.gpu.sums import constants_of, terms_of
from hasten.ops.packed import PackedLinear, QuantizedWeight, Weight
from hasten.ops.partial_sum import PartialSum
from hasten.ops.rounding import Inputs

_REGISTERS_ALONE = 64
"""With fewer, which the compiler prefers for the sake of other rows, a row's last loads wait for its first ones."""


@triton.jit
def normed(x, valid, gain, shift, eps, H: tl.constexpr, RMS: tl.constexpr):
    """The norm of a row, which is zero where it is not valid."""
    if RMS:
        centred = x
    else:
        mean = tl.sum(x, 0) / H
        centred = tl.where(valid, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / H
    return centred * tl.rsqrt(variance + eps) * gain + shift


@triton.jit
def added_up(
    row,
    h,
    valid,
    bias_h,
    added_bias_h,
    parts,
    part_stride,
    added,
    added_stride,
    residual,
    residual_rows,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDED_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """A row of a partial sum in fp32, with its biases, which may be read before its parts are there."""
    # strides are whole rows, and where the compiler knows that it loads 16 bytes at a time and not 4
    part_stride, added_stride = part_stride // H * H, added_stride // H * H
    residual_h = 0.0
    if HAS_RESIDUAL:
        from_row = tl.load(residual_rows + row) if HAS_ROWS else row
        residual_h = tl.load(residual + from_row * H + h, valid, 0.0).to(tl.float32)
    x = tl.load(parts + row * H + h, valid, 0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(parts + part * part_stride + row * H + h, valid, 0.0).to(tl.float32)
    for part in tl.static_range(ADDED):
        x += tl.load(added + part * added_stride + row * H + h, valid, 0.0).to(tl.float32)
    if HAS_BIAS:
        x += bias_h
    if HAS_ADDED_BIAS:
        x += added_bias_h
    if HAS_RESIDUAL:
        x += residual_h
    return x


@triton.jit(do_not_specialize=["part_stride", "added_stride"])
def _add_norm(
    parts,
    part_stride,
    bias,
    added,
    added_stride,
    added_bias,
    residual,
    residual_rows,
    total_out,
    weight,
    norm_bias,
    out,
    units,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDED_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    STORES_TOTAL: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RMS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    DIGITS: tl.constexpr,
    NIBBLES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the parts of a row, those of a second product, biases and residual; store the sum and its norm.

    With DIGITS above 0 the norm is stored rounded, as rows of WIDTH numbers and a unit each.
    """
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    valid = h < H
    gain = tl.load(weight + h, valid, 0.0).to(tl.float32)
    if OFFSET:
        gain += 1.0
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(norm_bias + h, valid, 0.0).to(tl.float32)
    bias_h = 0.0
    if HAS_BIAS:
        bias_h = tl.load(bias + h, valid, 0.0).to(tl.float32)
    added_bias_h = 0.0
    if HAS_ADDED_BIAS:
        added_bias_h = tl.load(added_bias + h, valid, 0.0).to(tl.float32)
    wait_for_inputs(PDL)
    x = added_up(
        row, h, valid, bias_h, added_bias_h, parts, part_stride, added, added_stride, residual, residual_rows,
        H, PARTS, ADDED, HAS_BIAS, HAS_ADDED_BIAS, HAS_RESIDUAL, HAS_ROWS,
    )  # fmt: skip
    if STORES_TOTAL:
        rounded = x.to(total_out.dtype.element_ty)
        tl.store(total_out + row * H + h, rounded, valid)
        x = rounded.to(tl.float32)
    y = normed(x, valid, gain, shift, eps, H, RMS).to(weight.dtype.element_ty)
    if DIGITS > 0:
        value = tl.where(valid, y, 0.0).to(tl.float32)
        tl.store(units + row, store_rounded(value, row, h, out, WIDTH, LARGEST, DIGITS, NIBBLES))
    else:
        tl.store(out + row * H + h, y, valid)


@triton.jit
def _embed_norm(
    ids,
    table,
    scales,
    weight,
    norm_bias,
    out,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Look a token's row up, multiply it by its scale where the table is quantized, and norm it."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    valid = h < H
    gain = tl.load(weight + h, valid, 0.0).to(tl.float32)
    shift = tl.load(norm_bias + h, valid, 0.0).to(tl.float32)
    wait_for_inputs(PDL)
    token = tl.load(ids + row).to(tl.int64)
    x = tl.load(table + token * H + h, valid, 0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(scales + token)
    y = normed(x, valid, gain, shift, eps, H, RMS=False)
    tl.store(out + row * H + h, y.to(out.dtype.element_ty), valid)


@overload
def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: PackedLinear | None,
) -> tuple[Inputs, Tensor]: ...


def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: PackedLinear | None = None,
) -> tuple[Inputs, Tensor]:
    sum_ = x_th if isinstance(x_th, PartialSum) else PartialSum(x_th)
    if sum_.peers is not None:
        return exchange_norm(sum_, sum_.peers, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset)
    total_th = weight_h.new_empty(sum_.shape) if isinstance(x_th, PartialSum) else None
    normed = _added_norm(sum_, total_th, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset, reader=reader)
    return normed, sum_.parts if total_th is None else total_th


def norm_alone(
    x_th: Tensor | PartialSum, weight_h: Tensor, bias_h: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    sum_ = x_th if isinstance(x_th, PartialSum) else PartialSum(x_th)
    if sum_.peers is not None:
        return exchange_norm(sum_, sum_.peers, weight_h, bias_h, eps, rms=rms, unit_offset=False)[0]
    normed = _added_norm(sum_, None, weight_h, bias_h, eps, rms=rms, unit_offset=False, reader=None)
    assert isinstance(normed, Tensor), "nothing reads it rounded"
    return normed


def _added_norm(
    sum_: PartialSum,
    total_th: Tensor | None,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool,
    unit_offset: bool,
    reader: PackedLinear | None,
) -> Inputs:
    """The norm of a sum, which is stored in `total_th` too, if that is given."""
    rows, width = sum_.shape
    normed, out, constants = _memory(reader, sum_.shape, weight_h)
    _add_norm[(rows,)](
        *terms_of(sum_, weight_h),
        weight_h if total_th is None else total_th,
        weight_h,
        weight_h if bias_h is None else bias_h,
        *out,
        eps,
        H=width,
        BLOCK_H=triton.next_power_of_2(max(width, constants["WIDTH"])),
        **constants,
        **constants_of(sum_),
        STORES_TOTAL=total_th is not None,
        HAS_SHIFT=bias_h is not None,
        RMS=rms,
        OFFSET=unit_offset,
        num_warps=row_warps(width),
        **_registers(rows, weight_h),
        **overlapped(weight_h),
    )
    return normed


def _registers(rows: int, tensor: Tensor) -> dict[str, int]:
    """Registers of a thread for a row: as many as hold all that it loads, where no multiprocessor has two rows."""
    alone = tensor.is_cuda and rows <= multiprocessors(tensor.device.index)
    return {"maxnreg": _REGISTERS_ALONE} if alone else {}


def _memory(
    reader: PackedLinear | None, shape: tuple[int, int], like: Tensor
) -> tuple[Inputs, tuple[Tensor, Tensor], dict[str, Any]]:
    """Where a norm is stored, the same as the kernel takes it, and what that must know of it."""
    rounding = None if reader is None else rounding_for(reader, shape, like)
    if rounding is not None:
        return rounding.rows, (rounding.rows.numbers, rounding.rows.units_t), rounding.constants
    out_th = with_room(like, *shape)
    return out_th, (out_th, like), {"WIDTH": 0, "LARGEST": 0.0, "DIGITS": 0, "NIBBLES": False}


@triton.jit
def _embed(ids, table, scales, out, first, held, H: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr):
    """A row of a shard of `held` rows, that of id `first` the first of them; zeros for any other id."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(ids + row).to(tl.int64) - first
    own = (local >= 0) & (local < held)
    h = tl.arange(0, BLOCK_H)
    x_h = tl.load(table + local * H + h, own & (h < H), 0.0)
    if scales is not None:
        x_h = x_h.to(tl.float32) * tl.load(scales + local, own, 0.0)
    tl.store(out + row * H + h, x_h.to(out.dtype.element_ty), h < H)


def embedding(ids_t: Tensor, weight_vh: Weight, first: int | None) -> Tensor:
    assert isinstance(weight_vh, Tensor | QuantizedWeight)  # tables have scales of rows
    values, scales = (weight_vh, None) if isinstance(weight_vh, Tensor) else (weight_vh.values, weight_vh.scales)
    held, width = values.shape
    out_th = values.new_empty(ids_t.shape[0], width, dtype=weight_vh.dtype)
    _embed[(ids_t.shape[0],)](
        ids_t, values, scales, out_th, first or 0, held, H=width, BLOCK_H=triton.next_power_of_2(width),
        num_warps=row_warps(width), **overlapped(values),
    )  # fmt: skip
    return out_th


def embedding_norm(ids_t: Tensor, table_vh: Weight, weight_h: Tensor, bias_h: Tensor, eps: float) -> Tensor:
    assert isinstance(table_vh, Tensor | QuantizedWeight)  # tables have scales of rows
    values, scales = (table_vh, None) if isinstance(table_vh, Tensor) else (table_vh.values, table_vh.scales)
    width = values.shape[1]
    out_th = with_room(weight_h, ids_t.shape[0], width)
    _embed_norm[(ids_t.shape[0],)](
        ids_t,
        values,
        weight_h if scales is None else scales,
        weight_h,
        bias_h,
        out_th,
        eps,
        H=width,
        BLOCK_H=triton.next_power_of_2(width),
        SCALED=scales is not None,
        num_warps=row_warps(width),
        **overlapped(values),
    )
    return out_th
