"""One row's product with a weight of 8 or 4 bits, by the instruction that multiplies four bytes by four and adds up.

The row is rounded before, to int8 or to 15 bits in two int8 digits (`row_rounding.py`); nibbles become bytes in two or
three instructions for eight of them. Sums within a group of input features are exact. Each thread reads its weights
from memory into registers, the first of them before the rounded row is there.

Shapes: N output features, W words of 32 bits a feature; a row [D digits, 1 or with nibbles 2 halves, W].
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.endings import Projection, store_sums, targets, widths
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.gpu.row_rounding import round_rows
from hasten.ops.packed import PackedLinear
from hasten.ops.rounding import BASE, Inputs

_BASE = tl.constexpr(BASE)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_DP4A = tl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;")
_LESS_MIDDLES = tl.constexpr("lop3.b32 $0, $1, 0xf0f0f0f0, 0x80808080, 0x6a;")
"""`($1 & _HIGH) ^ _MIDDLES` in one instruction, which the compiler does not find."""
_HIGH, _MIDDLES = tl.constexpr(-0x0F0F0F10), tl.constexpr(-0x7F7F7F80)
"""The high nibble of each byte, and its highest bit: a byte or nibble less its middle is that with this bit flipped."""
_ONES = tl.constexpr(0x01010101)
_ONES_OF_BYTES, _ONES_OF_NIBBLES = tl.constexpr(-0x7E7E7E7F), tl.constexpr(-0x66666667)
"""Words of bytes, and of nibbles, that are all 1, or 1 above their middle."""


@triton.jit
def _signed_byte(words, BYTE: tl.constexpr):
    return (words << (24 - 8 * BYTE)) >> 24


@triton.jit
def _dot4(a, b, total):
    """`total` and the products of the signed bytes of `a` with those of `b`."""
    if _INTERPRETED:
        for byte in tl.static_range(4):
            total += _signed_byte(a, byte) * _signed_byte(b, byte)
    else:
        total = tl.inline_asm_elementwise(_DP4A, "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1)
    return total


@triton.jit
def _high_nibbles(words):
    """The high nibble of each byte less its middle, sixteenfold."""
    if _INTERPRETED:
        words = (words & _HIGH) ^ _MIDDLES
    else:
        words = tl.inline_asm_elementwise(_LESS_MIDDLES, "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    return words


@triton.jit
def _dot16(a, b, total):
    """`total` [n, w / 4] and the products of each four words of `a` [n, w], which a thread holds, with those of `b`."""
    low, high = _halved(a), _halved(b)
    return _dot_pairs(low[1], high[1], _dot_pairs(low[0], high[0], total))


@triton.jit
def _halved(words):
    """[n, w] as two tensors of pairs [n, w / 4, 2]."""
    return tl.split(words.reshape([words.shape[0], words.shape[1] // 4, 2, 2]))


@triton.jit
def _dot_pairs(a, b, total):
    a1, a2 = tl.split(a)
    b1, b2 = tl.split(b)
    return _dot4(a2, b2, _dot4(a1, b1, total))


@triton.jit
def _read(start, at, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Words [n, BLOCK] of which `at` is the place in a row; zeros behind the row."""
    return tl.load(start) if WORDS % BLOCK == 0 else tl.load(start, (at < WORDS)[None, :], 0)


@triton.jit
def _products(
    words, x, at, total, WORDS: tl.constexpr, BLOCK: tl.constexpr, NIBBLES: tl.constexpr, CENTRED: tl.constexpr
):
    """`total` [n, BLOCK / 4] and the products of a block of words with one digit of the row.

    With CENTRED, values count from their middle, as those of nibbles always do, and sixteenfold.
    """
    x_w = _read(x + at[None, :], at, WORDS, BLOCK)
    if NIBBLES:
        total = _dot16(_high_nibbles(words << 4), x_w, total)
        total = _dot16(_high_nibbles(words), _read(x + WORDS + at[None, :], at, WORDS, BLOCK), total)
    else:
        total = _dot16(words ^ _MIDDLES if CENTRED else words, x_w, total)
    return total


@triton.jit
def _of_groups(
    scales,
    zeros,
    fours,
    row,
    N,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """Scales, and zero points less CENTRE, of four words each of rows; what is behind a row is scaled by zero."""
    at = (fours * 4 // GROUP).to(tl.int64)[None, :] * N + row[:, None]
    inside = (fours < WORDS // 4)[None, :]
    zero = tl.load(zeros + at, inside, 0).to(tl.int32) if HAS_ZEROS else MIDDLE
    return tl.load(scales + at, inside, 0.0), zero - CENTRE


@triton.jit(do_not_specialize=["N"])
def _one_row(
    x,
    units,
    weight,
    scales,
    zeros,
    bias,
    out,
    keys,
    values,
    slots,
    inverses,
    N,
    WORDS: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    DIGITS: tl.constexpr,
    NIBBLES: tl.constexpr,
    MIDDLE: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLIP: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program multiplies the row with ROWS rows of the weight, BLOCK words at a time.

    Digits of the row lie STRIDE words apart. With GROUP above 0, so many words of the weight have a scale of their own.
    With NIBBLES each 16 words have a unit of the row.
    """
    start_next(PDL)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.where(n < N, n, 0)
    at = tl.arange(0, BLOCK)
    four = tl.arange(0, BLOCK // 4)
    start = weight + row.to(tl.int64)[:, None] * WORDS + at[None, :]
    next_words = _read(start, at, WORDS, BLOCK)
    if GROUP > 0:
        next_scale, next_zero = _of_groups(scales, zeros, four, row, N, WORDS, GROUP, MIDDLE, CENTRE, HAS_ZEROS)
        total = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    else:
        scale_n = tl.load(scales + row)
        high = tl.zeros([ROWS, BLOCK // 4], tl.int32)
        low = tl.zeros([ROWS, BLOCK // 4], tl.int32)
    if HAS_BIAS:
        bias_n = tl.load(bias + row).to(tl.float32)
    wait_for_inputs(PDL)
    if not NIBBLES:
        unit = tl.load(units)
    for offset in tl.static_range(0, WORDS, BLOCK):
        words = next_words
        here = at + offset
        if GROUP > 0:
            scale, zero = next_scale, next_zero
        if offset + BLOCK < WORDS:
            next_words = _read(start + (offset + BLOCK), here + BLOCK, WORDS, BLOCK)
            if GROUP > 0:
                fours = four + (offset + BLOCK) // 4
                next_scale, next_zero = _of_groups(
                    scales, zeros, fours, row, N, WORDS, GROUP, MIDDLE, CENTRE, HAS_ZEROS
                )
        if GROUP > 0:
            nothing = tl.zeros([ROWS, BLOCK // 4], tl.int32)
            sums = _products(words, x, here, nothing, WORDS, BLOCK, NIBBLES, CENTRE > 0) * _BASE
            sums = _products(words, x + STRIDE, here, sums, WORDS, BLOCK, NIBBLES, CENTRE > 0)
            if HAS_ZEROS or MIDDLE != CENTRE:
                ones = tl.full(
                    [1, BLOCK], _ONES_OF_NIBBLES if NIBBLES else _ONES_OF_BYTES if CENTRE else _ONES, tl.int32
                )
                nothing = tl.zeros([1, BLOCK // 4], tl.int32)
                inputs = _products(ones, x, here, nothing, WORDS, BLOCK, NIBBLES, CENTRE > 0) * _BASE
                sums -= zero * _products(ones, x + STRIDE, here, inputs, WORDS, BLOCK, NIBBLES, CENTRE > 0)
            if NIBBLES:
                quad = (four + offset // 4) // 4  # of four words each, the 128 columns of a unit
                scale *= tl.load(units + quad, quad < WORDS // 16, 0.0)[None, :]
            total += sums.to(tl.float32) * scale
        else:
            high = _products(words, x, here, high, WORDS, BLOCK, NIBBLES, False)
            if DIGITS == 2:
                low = _products(words, x + STRIDE, here, low, WORDS, BLOCK, NIBBLES, False)
    if GROUP > 0:
        value = tl.sum(total, 1) * (1 / 16 if NIBBLES else unit)
    else:
        value = tl.sum(high, 1).to(tl.float32)
        if DIGITS == 2:
            value = value * _BASE + tl.sum(low, 1).to(tl.float32)
        value *= scale_n * unit
    if HAS_BIAS:
        value += bias_n
    m = tl.arange(0, 1)
    store_sums(
        value[:, None], m, n, 1, N, bias, out, keys, values, slots, inverses, 1, False, ACTIVATION, CLIP, Q, KV, D
    )


@dataclass(frozen=True)
class Cut:
    """How `_one_row` is cut: features a program, words at a time, warps."""

    rows: int
    block: int
    warps: int


_BYTES, _NIBBLES = Cut(4, 512, 4), Cut(4, 1024, 8)
"""Measured choices: docs/performance-log.md."""
_HALF_BYTE = 128
_VECTOR = 16
"""Bytes of a weight that a thread reads at once, all of one group."""


@dataclass(frozen=True)
class _Weights:
    """A weight as `_one_row` takes it."""

    words: Tensor
    scales: Tensor
    zeros: Tensor
    group: int = 0
    middle: int = 0
    centre: int = 0
    """What values are less of before they are multiplied, as far as that is a bit of theirs to flip."""
    nibbles: bool = False
    has_zeros: bool = False


def _weights(weight: PackedLinear) -> _Weights:
    grouped = weight.grouped
    if grouped is None:
        assert weight.plain is not None
        assert weight.scales is not None
        return _Weights(weight.plain.view(torch.int32), weight.scales, weight.scales)
    return _Weights(
        grouped.values.view(torch.int32),
        grouped.scales,
        grouped.scales if grouped.zeros is None else grouped.zeros,
        group=grouped.group_size // (8 if grouped.is_packed else 4),
        middle=grouped.middle,
        centre=grouped.middle if grouped.is_packed or grouped.middle == _HALF_BYTE else 0,
        nibbles=grouped.is_packed,
        has_zeros=grouped.zeros is not None,
    )


def serves(rows: int, dtype: torch.dtype, weight: PackedLinear) -> bool:
    """Whether `product` takes this weight, and there is a single row of a type that it takes."""
    if rows != 1 or (weight.inputs is None and dtype == torch.float32):
        return False
    if weight.grouped is None:
        return weight.plain is not None and weight.plain.dtype == torch.int8
    group = weight.grouped.group_size
    return group % (128 if weight.grouped.is_packed else _VECTOR) == 0


def product(
    x_1h: Inputs, weight: PackedLinear, bias_o: Tensor | None, activation: str | None, to: Projection | None
) -> Tensor:
    """[1, o] in the type of `x_1h`, with `to` the queries alone."""
    weights = _weights(weight)
    nibbles = weights.nibbles
    x_1k = weight.grouped.columns.of(x_1h) if weight.grouped is not None and isinstance(x_1h, Tensor) else x_1h
    numbers, units_t = round_rows(x_1k, weight.inputs, nibbles=nibbles)
    features, words = weights.words.shape
    cut = _NIBBLES if nibbles else _BYTES
    block = min(cut.block, triton.next_power_of_2(words))
    digits = 2 if weight.inputs is None else 1
    out = units_t.new_empty(1, features if to is None else to.queries, dtype=x_1h.dtype)
    _one_row[(triton.cdiv(features, cut.rows),)](
        numbers.view(torch.int32), units_t, weights.words, weights.scales, weights.zeros,
        out if bias_o is None else bias_o, out, *targets(to, out), features,
        WORDS=words, STRIDE=numbers.shape[1] // digits // 4, DIGITS=digits, ROWS=cut.rows, BLOCK=block,
        GROUP=weights.group, NIBBLES=nibbles, MIDDLE=weights.middle, CENTRE=weights.centre, HAS_ZEROS=weights.has_zeros,
        HAS_BIAS=bias_o is not None, ACTIVATION=activation, **widths(to),
        num_warps=min(cut.warps, max(1, block // 128)), **overlapped(out),
    )  # fmt: skip
    return out
