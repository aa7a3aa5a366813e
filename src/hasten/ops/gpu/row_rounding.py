"""Inputs of products rounded to 8 bits, as `ops/rounding.py` defines it. Shapes: t tokens, h input features."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.activations import activated
from hasten.ops.gpu.eight_bits import to_e4m3, whole
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.packed import PackedLinear
from hasten.ops.rounding import BASE, LARGEST, LARGEST_OF_DIGITS, Inputs, RoundedRows

_BASE = tl.constexpr(BASE)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_ALIGNED = 128
"""Input features are padded with zeros to a multiple of this."""
_FEW_ROWS = 64
"""Most rows whose rounding takes as many threads as there are; more rows fill the device with fewer threads each."""


@triton.jit
def _nibble_index(k, WIDTH: tl.constexpr):
    """The byte of a row that an input feature is for weights of 4 bits.

    Words of four nibbles hold columns 32 apart (`pack_nibbles`). The even nibbles of two neighbouring words are
    multiplied by four bytes of the first half of a row, the odd ones by those of the second.
    """
    nibble, word = k % 128 // 32, k // 128 * 32 + k % 32
    return nibble % 2 * (WIDTH // 2) + word // 2 * 4 + word % 2 * 2 + nibble // 2


@triton.jit
def store_rounded(
    value,
    row,
    k,
    numbers,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    DIGITS: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    """Store a row's inputs k, in fp32 and zeros behind its end, as multiples of the unit that it returns.

    NaN and infinity make all of them zeros, and the unit NaN.
    """
    top = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # magnitudes, and NaN above them, in their order
    damaged = top >= 0x7F800000
    greatest = tl.where(damaged, 0, top).to(tl.float32, bitcast=True)
    unit = tl.div_rn(tl.maximum(greatest, _TINY * LARGEST), LARGEST)
    # a plain product would be fused with the sum that rounds it, and then differ from the definition at ties
    number = tl.fma(tl.where(damaged, 0.0, value), tl.div_rn(1.0, unit), 0.0)
    target = numbers + row * DIGITS * WIDTH + (_nibble_index(k, WIDTH) if NIBBLES else k)
    kept = k < WIDTH
    dtype: tl.constexpr = numbers.dtype.element_ty
    if DIGITS == 2:
        number = whole(number)
        high = whole(number * (1 / _BASE))
        tl.store(target, high.to(dtype), kept)
        tl.store(target + WIDTH, (number - high * _BASE).to(dtype), kept)
    elif dtype == tl.int8:
        tl.store(target, whole(number).to(dtype), kept)
    else:
        tl.store(target, to_e4m3(number), kept)
    return tl.where(damaged, float("nan"), unit)


@triton.jit
def _round_rows(
    x,
    numbers,
    units,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LARGEST: tl.constexpr,
    DIGITS: tl.constexpr,
    NIBBLES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Round a row's inputs; zeros follow them up to WIDTH.

    With ACTIVATION, what is rounded is that of the row, in the type of the row; with GATED, that of its first half
    times its second.
    """
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    wait_for_inputs(PDL)
    start = x + row * (2 * K if GATED else K) + k
    value = tl.load(start, k < K, 0.0).to(tl.float32)
    if ACTIVATION is not None:
        value = activated(value, ACTIVATION)
        if GATED:
            value *= tl.load(start + K, k < K, 0.0).to(tl.float32)
        value = tl.where(k < K, value, 0.0).to(x.dtype.element_ty).to(tl.float32)
    tl.store(units + row, store_rounded(value, row, k, numbers, WIDTH, LARGEST, DIGITS, NIBBLES))


def padded(features: int) -> int:
    """Input features with those that pad them."""
    return triton.cdiv(features, _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Rounding:
    """Where a kernel stores rounded rows, and what it must know of them when it is compiled."""

    rows: RoundedRows
    constants: dict[str, Any]


def rounding_of(shape: tuple[int, int], like: Tensor, inputs: torch.dtype | None, *, nibbles: bool = False) -> Rounding:
    """Memory for rows of a shape in the type of `like`, rounded to `inputs`, or to two digits where that is None.

    `nibbles`: each digit in the order that weights of 4 bits are multiplied in, see `_nibble_index`.
    """
    rows, width = shape
    digits, wide = 2 if inputs is None else 1, padded(width)
    numbers = like.new_empty(rows, digits * wide, dtype=inputs or torch.int8)
    largest = LARGEST_OF_DIGITS if inputs is None else LARGEST[inputs]
    constants = {"WIDTH": wide, "LARGEST": largest, "DIGITS": digits, "NIBBLES": nibbles}
    units_t = like.new_empty(rows, dtype=torch.float32)
    return Rounding(RoundedRows(numbers, units_t, shape, like.dtype), constants)


def round_rows(
    x_th: Inputs, inputs: torch.dtype | None, *, activation: str | None = None, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """Numbers, [t, digits * padded h] of 8 bits, and units, [t] in fp32: of `inputs`, or of two digits where None.

    With `activation`, that of `x_th` is rounded; with `gated`, that of the first half of each row times the second.
    What is rounded already stays as it is.
    """
    if isinstance(x_th, RoundedRows):
        return x_th.numbers, x_th.units_t
    assert x_th.is_contiguous()
    rows, width = x_th.shape[0], x_th.shape[1] // (2 if gated else 1)
    rounding = rounding_of((rows, width), x_th, inputs)
    numbers, units_t = rounding.rows.numbers, rounding.rows.units_t
    block = triton.next_power_of_2(padded(width))
    _round_rows[(rows,)](
        x_th, numbers, units_t, K=width, BLOCK_K=block, ACTIVATION=activation, GATED=gated, **rounding.constants,
        num_warps=max(1, min(16, block // (256 if rows <= _FEW_ROWS else 1024))), **overlapped(x_th),
    )  # fmt: skip
    return numbers, units_t


def rounds(reader: PackedLinear, weight: PackedLinear) -> bool:
    """Whether an activation behind a library's product with `weight` is computed where it is rounded for `reader`."""
    return reader.inputs is not None and weight.inputs is not None


def activated_rows(x_th: Tensor, reader: PackedLinear, activation: str, *, gated: bool = False) -> RoundedRows:
    """The activation of `x_th`, or the gated unit of its halves, rounded as `reader` multiplies it."""
    numbers, units_t = round_rows(x_th, reader.inputs, activation=activation, gated=gated)
    return RoundedRows(numbers, units_t, (x_th.shape[0], reader.in_features), x_th.dtype)
