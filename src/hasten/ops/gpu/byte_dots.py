"""One row's product with a weight of 8 or 4 bits, by the instruction that multiplies four bytes by four and adds up.

Where the scheme rounds inputs to int8, the row is rounded before (`row_rounding.py`). Else each thread rounds what it
multiplies, 16 or 32 neighbouring inputs, to 15 bits in two int8 digits with a unit of their own, which takes no kernel
ahead and no other thread. Nibbles become bytes in two or three instructions for eight of them. Sums within a group of
input features are exact. Each thread reads its weights from memory into registers, the first of them before the row is
there.

Shapes: N output features, W words of 32 bits a feature, Q = W / 4 of which a thread takes four at a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.eight_bits import whole
from hasten.ops.gpu.endings import Projection, store_sums, targets, widths
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.gpu.row_rounding import round_rows
from hasten.ops.packed import PackedLinear
from hasten.ops.rounding import BASE, LARGEST_OF_DIGITS, Inputs

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
_LARGEST = tl.constexpr(LARGEST_OF_DIGITS - 1)
"""Of a thread's numbers: 1 less than digits hold, since the inverse of its unit is not exact."""
_LEAST = tl.constexpr(1e-30)
"""Greatest magnitude that a thread's unit is made for; smaller inputs are multiples of that unit, too."""
_TO_DIGITS = tl.constexpr("""{
    .reg .f32 a, b, c, d;
    .reg .b32 s, t, u, v;
    fma.rn.f32 a, $2, $6, 0f4B400040;
    fma.rn.f32 b, $3, $6, 0f4B400040;
    fma.rn.f32 c, $4, $6, 0f4B400040;
    fma.rn.f32 d, $5, $6, 0f4B400040;
    mov.b32 s, a;
    mov.b32 t, b;
    mov.b32 u, c;
    mov.b32 v, d;
    prmt.b32 s, s, t, 0x5410;
    prmt.b32 u, u, v, 0x5410;
    prmt.b32 t, s, u, 0x6420;
    lop3.b32 t, t, 0x7f7f7f7f, 0x40404040, 0x6a;
    shl.b32 v, t, 1;
    lop3.b32 $1, t, v, 0x80808080, 0xf8;
    shl.b32 s, s, 1;
    shl.b32 u, u, 1;
    prmt.b32 $0, s, u, 0x7531;
}""")
"""`_digits` of four inputs. A number and 64, added to 1.5 * 2^23, is in the low 16 bits of that: the high digit is in
bits 7 to 14, and the low one is bits 0 to 6 less 64, which is to flip bit 6 and to repeat it as the sign."""


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
def _halved(words, NIBBLES: tl.constexpr):
    """Each four words of [n, w] as two pairs [n, w / 4, 2]: with NIBBLES every second, else neighbours.

    So both pairs are multiplied by inputs of which a thread has read 16 bytes at a time.
    """
    fours = words.reshape([words.shape[0], words.shape[1] // 4, 2, 2])
    return tl.split(fours) if NIBBLES else tl.split(fours.permute(0, 1, 3, 2))


@triton.jit
def _read(start, at, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Words [n, BLOCK] of which `at` is the place in a row; zeros behind the row."""
    return tl.load(start) if WORDS % BLOCK == 0 else tl.load(start, (at < WORDS)[None, :], 0)


@triton.jit
def _input(four, AT: tl.constexpr, dtype: tl.constexpr):
    """One of four neighbouring inputs of 16 bits, in fp32."""
    return (four >> (16 * AT)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _magnitudes(four, dtype: tl.constexpr):
    """The greatest magnitude of each two times four inputs [1, q, 2], as bits of fp32: [1, q]; NaN is the greatest."""
    top = tl.zeros_like(four).to(tl.int32)
    for at in tl.static_range(4):
        top = tl.maximum(top, _input(four, at, dtype).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(top, 2)


@triton.jit
def _digits(a, b, c, d, inverse):
    """The high and the low digits of `number * inverse`, in bytes of words whose first is that of `a`."""
    if _INTERPRETED:
        high, low = tl.zeros_like(a).to(tl.int32), tl.zeros_like(a).to(tl.int32)
        for byte in tl.static_range(4):
            value = a if byte == 0 else b if byte == 1 else c if byte == 2 else d
            number = whole(tl.where(inverse > 0, value * inverse, 0.0)).to(tl.int32)  # NaN is no integer
            first = (number + _BASE // 2) >> 7
            high |= (first & 255) << (8 * byte)
            low |= ((number - first * _BASE) & 255) << (8 * byte)
    else:
        high, low = tl.inline_asm_elementwise(
            _TO_DIGITS, "=r,=r,r,r,r,r,r", [a, b, c, d, inverse], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return high, low


@triton.jit
def _four_inputs(x, at, INPUTS: tl.constexpr, WHOLE: tl.constexpr):
    """Inputs by fours [1, q, 2]; zeros behind the row."""
    return tl.load(x + at) if WHOLE else tl.load(x + at, at < INPUTS // 4, 0)


@triton.jit
def _rounded(x, quad, dtype: tl.constexpr, INPUTS: tl.constexpr, WHOLE: tl.constexpr, NIBBLES: tl.constexpr):
    """What each of `quad`'s four words of a weight are multiplied by: high digits, low ones, and units [1, q].

    Digits are words [1, q, 2] for each of the words of `_halved`, with nibbles for its low and its high nibbles. Of 16
    words, which hold 128 columns by `pack_nibbles`, word i has the low and high nibbles of columns 2i, 2i + 64, 2i + 1
    and 2i + 65, and of those 32 behind.
    """
    pair = tl.arange(0, 2)[None, None, :]
    quad = quad[None, :, None]
    if NIBBLES:
        at = quad // 4 * 32 + quad % 4 * 2 + pair
        x0 = _four_inputs(x, at, INPUTS, WHOLE)
        x1 = _four_inputs(x, at + 8, INPUTS, WHOLE)
        x2 = _four_inputs(x, at + 16, INPUTS, WHOLE)
        x3 = _four_inputs(x, at + 24, INPUTS, WHOLE)
        top = tl.maximum(_magnitudes(x0, dtype), _magnitudes(x1, dtype))
        top = tl.maximum(top, tl.maximum(_magnitudes(x2, dtype), _magnitudes(x3, dtype)))
    else:
        at = quad * 4 + pair
        x0 = _four_inputs(x, at, INPUTS, WHOLE)
        x1 = _four_inputs(x, at + 2, INPUTS, WHOLE)
        top = tl.maximum(_magnitudes(x0, dtype), _magnitudes(x1, dtype))
    greatest = top.to(tl.float32, bitcast=True)
    greatest = tl.where(greatest < float("inf"), tl.maximum(greatest, _LEAST), float("nan"))
    inverse = tl.broadcast_to((1.0 / greatest * _LARGEST)[:, :, None], x0.shape)
    if NIBBLES:
        h0, l0 = _digits_of_columns(x0, x2, 0, inverse, dtype)
        h1, l1 = _digits_of_columns(x1, x3, 0, inverse, dtype)
        h2, l2 = _digits_of_columns(x0, x2, 2, inverse, dtype)
        h3, l3 = _digits_of_columns(x1, x3, 2, inverse, dtype)
    else:
        h0, l0 = _digits_of_four(x0, inverse, dtype)
        h1, l1 = _digits_of_four(x1, inverse, dtype)
    high = (h0, h1, h2, h3) if NIBBLES else (h0, h1)
    low = (l0, l1, l2, l3) if NIBBLES else (l0, l1)
    return high, low, greatest * (1 / _LARGEST)


@triton.jit
def _digits_of_four(four, inverse, dtype: tl.constexpr):
    return _digits(
        _input(four, 0, dtype), _input(four, 1, dtype), _input(four, 2, dtype), _input(four, 3, dtype), inverse
    )


@triton.jit
def _digits_of_columns(four, other, AT: tl.constexpr, inverse, dtype: tl.constexpr):
    """Those of two neighbours of `four`, each followed by that 64 columns behind it."""
    return _digits(
        _input(four, AT, dtype), _input(other, AT, dtype),
        _input(four, AT + 1, dtype), _input(other, AT + 1, dtype), inverse,
    )  # fmt: skip


@triton.jit
def _stored(x, at, WORDS: tl.constexpr, BLOCK: tl.constexpr, NIBBLES: tl.constexpr):
    """One digit of a rounded row, in words as `_rounded` returns them."""
    a, b = _halved(_read(x + at[None, :], at, WORDS, BLOCK), NIBBLES)
    if NIBBLES:
        c, d = _halved(_read(x + WORDS + at[None, :], at, WORDS, BLOCK), NIBBLES)
    return (a, c, b, d) if NIBBLES else (a, b)


@triton.jit
def _products(a, b, digits, total, NIBBLES: tl.constexpr, CENTRED: tl.constexpr):
    """`total` [n, q, 2] and the products of both halves of words with one digit of the row.

    With CENTRED, values count from their middle, as those of nibbles always do, and sixteenfold.
    """
    if NIBBLES:
        total = _dot4(_high_nibbles(a << 4), digits[0], total)
        total = _dot4(_high_nibbles(a), digits[1], total)
        total = _dot4(_high_nibbles(b << 4), digits[2], total)
        total = _dot4(_high_nibbles(b), digits[3], total)
    else:
        total = _dot4(a ^ _MIDDLES if CENTRED else a, digits[0], total)
        total = _dot4(b ^ _MIDDLES if CENTRED else b, digits[1], total)
    return total


@triton.jit
def _sums(a, b, high, low, NIBBLES: tl.constexpr, CENTRED: tl.constexpr):
    """The products of both halves of words with numbers of two digits: [n, q]."""
    nothing = tl.zeros([a.shape[0], high[0].shape[1], 2], tl.int32)
    sums = _products(a, b, high, nothing, NIBBLES, CENTRED) * _BASE
    return tl.sum(_products(a, b, low, sums, NIBBLES, CENTRED), 2)


@triton.jit
def _of_groups(
    scales,
    zeros,
    quad,
    row,
    N,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """Scales, and zero points less CENTRE, of four words each of rows; what is behind a row is scaled by zero."""
    at = (quad * 4 // GROUP).to(tl.int64)[None, :] * N + row[:, None]
    inside = (quad < WORDS // 4)[None, :]
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
    INPUTS: tl.constexpr,
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

    With DIGITS above 0, `x` is words of so many digits, INPUTS words each, which have one unit; else INPUTS numbers of
    16 bits by fours. With GROUP above 0, so many words of the weight have a scale of their own.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    one: tl.constexpr = _ONES_OF_NIBBLES if NIBBLES else _ONES_OF_BYTES if CENTRE else _ONES
    start_next(PDL)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.where(n < N, n, 0)
    at = tl.arange(0, BLOCK)
    quad = tl.arange(0, BLOCK // 4)
    start = weight + row.to(tl.int64)[:, None] * WORDS + at[None, :]
    next_words = _read(start, at, WORDS, BLOCK)
    if GROUP > 0:
        next_scale, next_zero = _of_groups(scales, zeros, quad, row, N, WORDS, GROUP, MIDDLE, CENTRE, HAS_ZEROS)
    else:
        scale_n = tl.load(scales + row)
    if HAS_BIAS:
        bias_n = tl.load(bias + row).to(tl.float32)
    wait_for_inputs(PDL)
    exact = tl.zeros([ROWS, BLOCK // 4, 2], tl.int32)
    total = tl.zeros([ROWS, BLOCK // 4], tl.float32)
    for offset in tl.static_range(0, WORDS, BLOCK):
        a, b = _halved(next_words, NIBBLES)
        if GROUP > 0:
            scale, zero = next_scale, next_zero
        if offset + BLOCK < WORDS:
            next_words = _read(start + (offset + BLOCK), at + (offset + BLOCK), WORDS, BLOCK)
            if GROUP > 0:
                next_scale, next_zero = _of_groups(
                    scales, zeros, quad + (offset + BLOCK) // 4, row, N, WORDS, GROUP, MIDDLE, CENTRE, HAS_ZEROS
                )
        if DIGITS == 0:
            end = (offset + BLOCK) * (8 if NIBBLES else 4)
            high, low, unit = _rounded(x, quad + offset // 4, dtype, INPUTS, end <= INPUTS, NIBBLES)
        else:
            high = _stored(x, at + offset, WORDS, BLOCK, NIBBLES)
            if DIGITS == 2:
                low = _stored(x + INPUTS, at + offset, WORDS, BLOCK, NIBBLES)
        if DIGITS == 1:
            exact = _products(a, b, high, exact, NIBBLES, False)
        else:
            sums = _sums(a, b, high, low, NIBBLES, CENTRE > 0)
            if HAS_ZEROS or MIDDLE != CENTRE:
                ones = tl.full([1, 1, 1], one, tl.int32)
                sums -= zero * _sums(ones, ones, high, low, NIBBLES, CENTRE > 0)
            value = sums.to(tl.float32)
            if DIGITS == 0:
                value *= unit
            total += value * scale if GROUP > 0 else value
    value = tl.sum(tl.sum(exact, 2), 1).to(tl.float32) if DIGITS == 1 else tl.sum(total, 1)
    if GROUP == 0:
        value *= scale_n
    if NIBBLES:
        value *= 1 / 16
    if DIGITS > 0:
        value *= tl.load(units)
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


_FROM_DIGITS, _NIBBLES_FROM_DIGITS = Cut(4, 512, 4), Cut(4, 1024, 8)
_ROUNDING, _LONG_ROUNDING = Cut(8, 512, 4), Cut(8, 256, 2)
"""Of programs that round what they multiply; the second of nibbles that one block of the first does not hold."""
_HALF_BYTE = 128
_FOUR = 4
"""Inputs of 16 bits that are read as one number."""
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


def _cut(weights: _Weights, digits: int) -> Cut:
    """Measured choices: docs/performance-log.md."""
    if digits > 0:
        return _NIBBLES_FROM_DIGITS if weights.nibbles else _FROM_DIGITS
    return _LONG_ROUNDING if weights.nibbles and weights.words.shape[1] > _ROUNDING.block else _ROUNDING


def serves(rows: int, dtype: torch.dtype, weight: PackedLinear) -> bool:
    """Whether `product` takes this weight, and there is a single row of a type that it takes."""
    if rows != 1:
        return False
    if weight.inputs is not None:
        return weight.inputs == torch.int8
    if dtype == torch.float32:
        return False
    if weight.grouped is None:
        return weight.plain is not None and weight.plain.dtype == torch.int8 and weight.in_features % _FOUR == 0
    group = weight.grouped.group_size
    return group % (128 if weight.grouped.is_packed else _VECTOR) == 0


def product(
    x_1h: Inputs, weight: PackedLinear, bias_o: Tensor | None, activation: str | None, to: Projection | None
) -> Tensor:
    """[1, o] in the type of `x_1h`, with `to` the queries alone."""
    weights = _weights(weight)
    features, words = weights.words.shape
    if weight.inputs is None and isinstance(x_1h, Tensor):
        x_1k = x_1h if weight.grouped is None else weight.grouped.columns.of(x_1h)
        digits, inputs = 0, x_1k.shape[1]
        numbers = units_t = x_1k.view(torch.int64)
    else:
        numbers, units_t = round_rows(x_1h, weight.inputs)
        numbers = numbers.view(torch.int32)
        digits = 2 if weight.inputs is None else 1
        inputs = numbers.shape[1] // digits
    cut = _cut(weights, digits)
    block = min(cut.block, triton.next_power_of_2(words))
    out = weights.scales.new_empty(1, features if to is None else to.queries, dtype=x_1h.dtype)
    _one_row[(triton.cdiv(features, cut.rows),)](
        numbers, units_t, weights.words, weights.scales, weights.zeros,
        out if bias_o is None else bias_o, out, *targets(to, out), features,
        WORDS=words, INPUTS=inputs, DIGITS=digits, ROWS=cut.rows, BLOCK=block,
        GROUP=weights.group, NIBBLES=weights.nibbles, MIDDLE=weights.middle, CENTRE=weights.centre,
        HAS_ZEROS=weights.has_zeros, HAS_BIAS=bias_o is not None, ACTIVATION=activation, **widths(to),
        num_warps=min(cut.warps, max(1, block // 128)), **overlapped(out),
    )  # fmt: skip
    return out
