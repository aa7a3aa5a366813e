"""Choosing tokens. Shapes: r rows, v vocabulary, b logits of a block.

Nothing is sorted. The bits of an fp32 number, with those below the sign turned over where it is negative, are an
integer in the same order: its image. Every filter keeps the logits from some image on, and bisection finds that one in
at most as many passes over the row as its type has bits; the row lies in the L2 cache after the first.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.draws import NONE_LEFT, Draws
from hasten.ops.gpu.launch import overlapped, wait_for_inputs

_CONSTANT_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Lowest bits of the image that tell no two numbers of a type apart."""
_CHUNK = 2048
"""Logits of one program of `greedy`: a single row of 250,000 then has work for 120 of them."""
_BLOCK = 8192
"""Logits that a program of `draw` looks at together."""

_INFINITE = tl.constexpr(0x7F800000)
"""The image of infinity; minus infinity has its complement."""
_LAST = tl.constexpr(0x7FFFFFFF)
_NO_KEY = tl.constexpr(-(1 << 63))
_NONE_LEFT = tl.constexpr(NONE_LEFT)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _read(row, tokens_b, SIZE: tl.constexpr):
    """Logits in fp32. NaN reads as infinity, which no maximum overlooks; behind the row is minus infinity."""
    x_b = tl.load(row + tokens_b, tokens_b < SIZE, float("-inf")).to(tl.float32)
    return tl.where(x_b == x_b, x_b, float("inf"))


@triton.jit
def _image(x, BITS: tl.constexpr):
    """The images of fp32 numbers without their lowest bits. Zero has two signs and one image."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> BITS


@triton.jit
def _best_of_chunk(logits, keys, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The greatest key of a chunk: the image of the logit, and then how far its token is from the last possible."""
    wait_for_inputs(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens_b = chunk * BLOCK + tl.arange(0, BLOCK)
    image_b = _image(_read(logits + row * stride, tokens_b, SIZE), 0)
    keys_b = (image_b.to(tl.int64) << 32) | (_LAST - tokens_b)
    tl.store(keys + row * tl.num_programs(1) + chunk, tl.max(keys_b, 0))


@triton.jit
def _best_of_row(keys, tokens, chunks, CHUNKS: tl.constexpr, PDL: tl.constexpr):
    """The token of the greatest key of a row's chunks."""
    wait_for_inputs(PDL)
    row, chunk = tl.program_id(0), tl.arange(0, CHUNKS)
    key = tl.max(tl.load(keys + row * chunks + chunk, chunk < chunks, _NO_KEY), 0)
    image = key >> 32
    finite = (image > ~_INFINITE) & (image < _INFINITE)
    none = tl.where(image < _INFINITE, _NONE_LEFT, -1)
    tl.store(tokens + row, tl.where(finite, _LAST - (key & _LAST), none))


def greedy(logits_rv: Tensor) -> Tensor:
    rows, size = logits_rv.shape
    assert logits_rv.stride(1) == 1
    chunks = triton.cdiv(size, _CHUNK)
    keys = logits_rv.new_empty(rows, chunks, dtype=torch.int64)
    tokens_r = logits_rv.new_empty(rows, dtype=torch.int32)
    options = overlapped(logits_rv)
    _best_of_chunk[(rows, chunks)](
        logits_rv, keys, logits_rv.stride(0), SIZE=size, BLOCK=_CHUNK, num_warps=4, **options
    )
    _best_of_row[(rows,)](keys, tokens_r, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1, **options)
    return tokens_r


@triton.jit
def _best(row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a row, infinite if any of them is or is NaN."""
    best_b = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, SIZE, BLOCK):
        best_b = tl.maximum(best_b, _read(row, start + tl.arange(0, BLOCK), SIZE))
    return tl.max(best_b, 0)


@triton.jit
def _least(row, bound, otherwise, SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The least image of the finite logits from `bound` on."""
    least_b = tl.full([BLOCK], 0, tl.int32) + otherwise
    for start in range(0, SIZE, BLOCK):
        x_b = _read(row, start + tl.arange(0, BLOCK), SIZE)
        kept_b = (x_b > float("-inf")) & (x_b.to(tl.float64) >= bound)
        least_b = tl.minimum(least_b, tl.where(kept_b, _image(x_b, BITS), otherwise))
    return tl.min(least_b, 0)


@triton.jit
def _value(image, BITS: tl.constexpr):
    """The least number with an image, or what as many logits are at least equal to."""
    whole = (image << BITS) | tl.where(image < 0, (1 << BITS) - 1, 0)
    return (whole ^ ((whole >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _finite(row, tokens_b, SIZE: tl.constexpr):
    """Logits in fp32 of a row that is known to hold neither NaN nor infinity; behind the row is minus infinity."""
    return tl.load(row + tokens_b, tokens_b < SIZE, float("-inf")).to(tl.float32)


@triton.jit
def _amounts_from(
    row,
    first,
    second,
    third,
    best,
    sharpness,
    BY_WEIGHT: tl.constexpr,
    ONLY_FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many logits lie from each of three images on, or the sum of their weights, in fp64.

    Weights are probabilities relative to the greatest. `ONLY_FIRST` leaves the others 0.
    """
    first_b = tl.zeros([BLOCK], tl.float32)
    second_b = tl.zeros([BLOCK], tl.float32)
    third_b = tl.zeros([BLOCK], tl.float32)
    # Comparing numbers saves finding the image of each logit.
    first, second, third = _value(first, BITS), _value(second, BITS), _value(third, BITS)
    for start in range(0, SIZE, BLOCK):
        x_b = _finite(row, start + tl.arange(0, BLOCK), SIZE)
        weight_b = tl.exp2((x_b - best) * sharpness) if BY_WEIGHT else 1.0
        first_b += tl.where(x_b >= first, weight_b, 0.0)
        if not ONLY_FIRST:
            second_b += tl.where(x_b >= second, weight_b, 0.0)
            third_b += tl.where(x_b >= third, weight_b, 0.0)
    return tl.sum(first_b.to(tl.float64), 0), tl.sum(second_b.to(tl.float64), 0), tl.sum(third_b.to(tl.float64), 0)


@triton.jit
def _mean(low, high):
    """Rounded down; their sum could overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _floor(
    row,
    low,
    high,
    limit,
    best,
    sharpness,
    BY_WEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least image between two above which there is less than `limit`; or what keeps the same logits as it.

    A pass looks at the three images that divide what is left into quarters: reading takes longer than comparing.
    """
    while low < high:
        second = _mean(low, high)
        first, third = _mean(low, second), _mean(second, high)
        above_first, above_second, above_third = _amounts_from(
            row, first + 1, second + 1, third + 1, best, sharpness, BY_WEIGHT, False, SIZE, BITS, BLOCK
        )
        # Amounts fall from one image to the next: the last that reaches the limit is the lower end.
        reached = tl.where(
            above_third >= limit, above_third, tl.where(above_second >= limit, above_second, above_first)
        )
        high = tl.where(above_third < limit, third, high)
        high = tl.where(above_second < limit, second, high)
        high = tl.where(above_first < limit, first, high)
        low = tl.where(above_first >= limit, first + 1, low)
        low = tl.where(above_second >= limit, second + 1, low)
        low = tl.where(above_third >= limit, third + 1, low)
        # Exactly so much lies above: the images from here to the next logit's are all as good.
        high = tl.where(reached == limit, low, high)
    return low


@triton.jit
def _weights(row, tokens_b, floor, best, sharpness, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Weights of a block, in fp64, and 0 for what the filters drop."""
    x_b = _finite(row, tokens_b, SIZE)
    weight_b = tl.exp2((x_b - best) * sharpness).to(tl.float64)
    return tl.where(x_b >= _value(floor, BITS), weight_b, 0.0)


@triton.jit
def _token_at(row, floor, target, best, sharpness, SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The last token with a weight such that no more than `target` lies before it, in the vocabulary's order."""
    start, before, block, before_block = 0, target * 0, 0, target * 0
    while (start < SIZE) & (before <= target):
        weight_b = _weights(row, start + tl.arange(0, BLOCK), floor, best, sharpness, SIZE, BITS)
        mass = tl.sum(weight_b, 0)
        if mass > 0:
            block, before_block = start, before
        before += mass
        start += BLOCK
    tokens_b = block + tl.arange(0, BLOCK)
    weight_b = _weights(row, tokens_b, floor, best, sharpness, SIZE, BITS)
    before_b = before_block + tl.cumsum(weight_b, 0) - weight_b
    return tl.max(tl.where((weight_b > 0) & (before_b <= target), tokens_b, -1), 0)


@triton.jit
def _draw(
    logits,
    draws,
    tokens,
    stride,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: find where the filters cut it, and invert what is left at the row's point."""
    wait_for_inputs(PDL)
    at = tl.program_id(0).to(tl.int64)
    row, own = logits + at * stride, draws + at * 5
    temperature, top_k, top_p = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    min_p, point = tl.load(own + 3), tl.load(own + 4)
    # An inverse of 0 in fp32, times minus infinity, would be NaN.
    temperature = tl.minimum(temperature, 1e37)
    sharpness = (1 / temperature * _LOG2_E).to(tl.float32)  # weights are powers of 2: the device has those alone
    best = _best(row, SIZE, BLOCK)
    token = tl.where(best < 0, _NONE_LEFT, -1)
    if (best > float("-inf")) & (best < float("inf")):
        high = _image(best, BITS)
        floor = (~_INFINITE >> BITS) + 1
        if (min_p > 0) | (top_k > 0) | (top_p < 1):
            # What is less probable than that has no weight in fp32.
            bound = best + temperature * tl.log(tl.maximum(min_p, 1e-300))
            floor = _least(row, bound, high, SIZE, BITS, BLOCK)
        if (top_k > 0) & (top_k < SIZE):
            floor = _floor(row, floor, high, top_k, best, sharpness, False, SIZE, BITS, BLOCK)
        total, _, _ = _amounts_from(row, floor, floor, floor, best, sharpness, True, True, SIZE, BITS, BLOCK)
        if top_p < 1:
            # All tokens up to this one, even if they were the whole vocabulary, are less than what top-p drops.
            dropped = best + temperature * tl.log((1 - top_p) / (2 * SIZE))
            floor = tl.maximum(floor, _image(dropped.to(tl.float32), BITS))
            floor = _floor(row, floor, high, top_p * total, best, sharpness, True, SIZE, BITS, BLOCK)
            total, _, _ = _amounts_from(row, floor, floor, floor, best, sharpness, True, True, SIZE, BITS, BLOCK)
        token = _token_at(row, floor, point * total, best, sharpness, SIZE, BITS, BLOCK)
    tl.store(tokens + at, token)


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:
    rows, size = logits_rv.shape
    assert logits_rv.stride(1) == 1
    assert draws.packed_r5.shape == (rows, 5)
    tokens_r = logits_rv.new_empty(rows, dtype=torch.int32)
    _draw[(rows,)](
        logits_rv,
        draws.packed_r5,
        tokens_r,
        logits_rv.stride(0),
        SIZE=size,
        BITS=_CONSTANT_BITS[logits_rv.dtype],
        BLOCK=_BLOCK,
        num_warps=16,
        **overlapped(logits_rv),
    )
    return tokens_r
