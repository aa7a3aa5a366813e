"""Where the filters of a draw cut each row. Shapes: r rows, v vocabulary, b logits of a block, c chunks, s images.

Nothing is sorted. Every filter keeps the logits from some image on (`sampling.py`), its cut. A first pass over the
logits finds the ends of each row, two more the amounts of what lies from some images between them on, which leaves few
logits that can be the cut. All programs of a pass work on chunks of their own, so that few rows occupy the device too.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.draws import Draws
from hasten.ops.gpu.launch import overlapped, wait_for_inputs
from hasten.ops.gpu.sampling import _INFINITE, _image, _read

CONSTANT_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Lowest bits of the image that tell no two numbers of a type apart."""
BLOCK, WARPS = 4096, 4
"""Logits of one program, and its warps."""
_STEPS = (8, 8)
"""Images that the first and the second pass find the amounts for; powers of 2."""

_LOG2_E = tl.constexpr(math.log2(math.e))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_CUT = tl.constexpr(6)
"""Numbers of a row's cut, in fp64: the greatest logit, the factor from its distance to a weight's logarithm, the images
that the cut lies between, what must not be reached above it (count or weight), and its kind."""
_BY_COUNT, _BY_WEIGHT = tl.constexpr(1), tl.constexpr(2)
"""Kinds of cuts: by top-k first, by top-p alone. 0: by min-p alone or not at all; -1: the row has no token."""


@triton.jit
def _value(image, BITS: tl.constexpr):
    """The least number with an image, or what as many logits are at least equal to."""
    whole = (image << BITS) | tl.where(image < 0, (1 << BITS) - 1, 0)
    return (whole ^ ((whole >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _image_from(bound, BITS: tl.constexpr):
    """The least image of a finite number that is not below `bound`, an fp64 number."""
    image = tl.maximum(_image(tl.maximum(bound, -_LARGEST).to(tl.float32), BITS), (~_INFINITE >> BITS) + 1)
    return tl.where(_value(image, BITS).to(tl.float64) < bound, image + 1, image)


@triton.jit
def _finite(row, tokens_b, SIZE: tl.constexpr):
    """Logits in fp32 of a row that is known to hold neither NaN nor infinity; behind the row is minus infinity."""
    return tl.load(row + tokens_b, tokens_b < SIZE, float("-inf")).to(tl.float32)


@triton.jit
def _ends(logits, ends, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A chunk's greatest logit and its least one above minus infinity."""
    wait_for_inputs(PDL)
    r, c, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x_b = _read(logits + r * stride, c * BLOCK + tl.arange(0, BLOCK), SIZE)
    own = ends + (r * chunks + c) * 2
    tl.store(own, tl.max(x_b, 0))
    tl.store(own + 1, tl.min(tl.where(x_b > float("-inf"), x_b, float("inf")), 0))


@triton.jit
def _between(low, high, step, STEPS: tl.constexpr, BITS: tl.constexpr):
    """The image after `step` of `STEPS` equal steps from the value of one image to that of another.

    Steps of images would be powers of 2, most of them next to zero, where few logits are.
    """
    low_value, high_value = _value(low, BITS).to(tl.float64), _value(high, BITS).to(tl.float64)
    value = low_value + (high_value - low_value) * (step.to(tl.float64) / STEPS)
    image = tl.where(high - low.to(tl.int64) < STEPS, low + step, _image(value.to(tl.float32), BITS))
    return tl.maximum(tl.minimum(image, high), tl.minimum(low + 1, high))


@triton.jit
def _bracket(
    draws,
    ends,
    cuts,
    images,
    chunks,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one row: where its filters can cut it, before any sums are known."""
    wait_for_inputs(PDL)
    r, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    temperature, top_k, top_p = tl.load(draws + r * 5), tl.load(draws + r * 5 + 1), tl.load(draws + r * 5 + 2)
    min_p = tl.load(draws + r * 5 + 3)
    # An inverse of 0 in fp32, times minus infinity, would be NaN.
    temperature = tl.minimum(temperature, 1e37)
    best = tl.max(tl.load(ends + (r * chunks + c) * 2, c < chunks, float("-inf")), 0)
    least = tl.min(tl.load(ends + (r * chunks + c) * 2 + 1, c < chunks, float("inf")), 0)
    cut = cuts + r * _CUT
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(cut, best)
    best, least = tl.where(finite, best, 0.0), tl.where(finite, least, 0.0)
    tl.store(cut + 1, tl.minimum(1 / temperature * _LOG2_E, _LARGEST))  # weights are powers of 2, the device's own
    high = _image(best, BITS)
    # What is less probable than 1e-300 has no weight in fp32.
    floor = tl.minimum(_image_from(best + temperature * tl.log(tl.maximum(min_p, 1e-300)), BITS), high)
    by_count, by_weight = (top_k > 0) & (top_k < SIZE), top_p < 1
    low = tl.maximum(floor, tl.minimum(_image(least, BITS), high))
    if by_weight:
        # All tokens up to this one, even if they were the whole vocabulary, are less than what top-p drops.
        dropped = tl.maximum(best + temperature * tl.log((1 - top_p) / (2 * SIZE)), -_LARGEST)
        above = tl.maximum(low, tl.minimum(_image(dropped.to(tl.float32), BITS), high))
        low = tl.where(by_count, low, above)
    cutting = by_count | by_weight
    tl.store(cut + 2, tl.where(cutting, low, floor))
    tl.store(cut + 3, tl.where(cutting, high, floor))
    tl.store(cut + 4, tl.where(by_count, top_k, 0))
    tl.store(cut + 5, tl.where(finite, tl.where(by_count, _BY_COUNT, tl.where(by_weight, _BY_WEIGHT, 0)), -1))
    step = tl.arange(0, STEPS)
    # The first amount is that of all tokens that top-p looks at.
    tl.store(images + r * STEPS + step, tl.where(step == 0, floor, _between(low, high, step, STEPS, BITS)))


@triton.jit
def _amounts(
    logits,
    cuts,
    images,
    amounts,
    stride,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many logits of a chunk lie from each of the row's images on, or the sum of their weights.

    Weights are probabilities relative to the greatest.
    """
    wait_for_inputs(PDL)
    r, c, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    best, sharpness = tl.load(cuts + r * _CUT).to(tl.float32), tl.load(cuts + r * _CUT + 1).to(tl.float32)
    kind = tl.load(cuts + r * _CUT + 5)
    if kind > 0:
        x_b = _finite(logits + r * stride, c * BLOCK + tl.arange(0, BLOCK), SIZE)
        weight_b = tl.where(kind == _BY_COUNT, 1.0, tl.exp2((x_b - best) * sharpness))
        for step in tl.static_range(STEPS):
            # Comparing numbers saves finding the image of each logit.
            least = _value(tl.load(images + r * STEPS + step), BITS)
            amount = tl.sum(weight_b * (x_b >= least).to(tl.float32), 0)
            tl.store(amounts + (r * chunks + c) * STEPS + step, amount)


@triton.jit
def _narrow(
    draws,
    cuts,
    images,
    amounts,
    next_images,
    chunks,
    FIRST: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    NEXT_STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one row: between which of its images the cut is, and the images to look at next, if any."""
    wait_for_inputs(PDL)
    r, c, step = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS), tl.arange(0, STEPS)
    cut = cuts + r * _CUT
    kind = tl.load(cut + 5)
    if kind > 0:
        at_cs = (r * chunks + c[:, None]) * STEPS + step[None, :]
        amount_s = tl.sum(tl.load(amounts + at_cs, c[:, None] < chunks, 0.0).to(tl.float64), 0)
        image_s = tl.load(images + r * STEPS + step)
        low, high, limit = tl.load(cut + 2).to(tl.int32), tl.load(cut + 3).to(tl.int32), tl.load(cut + 4)
        if FIRST:
            total = tl.sum(tl.where(step == 0, amount_s, 0.0), 0)
            limit = tl.where(kind == _BY_WEIGHT, tl.load(draws + r * 5 + 2) * total, limit)
            tl.store(cut + 4, limit)
        reached_s = (amount_s >= limit) & (image_s > low) & (image_s <= high)
        missed_s = (amount_s < limit) & (image_s > low) & (image_s <= high)
        new_low = tl.max(tl.where(reached_s, image_s, low), 0)
        high = tl.maximum(tl.min(tl.where(missed_s, image_s - 1, high), 0), new_low)
        if NEXT_STEPS > 0:
            next_step = tl.arange(0, NEXT_STEPS)
            next_s = _between(new_low, high, next_step + 1, NEXT_STEPS + 1, BITS)
            tl.store(next_images + r * NEXT_STEPS + next_step, next_s)
        elif (kind == _BY_COUNT) & (tl.load(draws + r * 5 + 2) < 1):
            high = _image(tl.load(cut).to(tl.float32), BITS)  # top-p may cut anywhere above
        tl.store(cut + 2, new_low)
        tl.store(cut + 3, high)


def _find_cuts(logits_rv: Tensor, draws: Draws) -> Tensor:
    """Where each row is cut, as narrowly as the first passes find it."""
    (rows, size), stride, options = logits_rv.shape, logits_rv.stride(0), overlapped(logits_rv)
    bits, chunks = CONSTANT_BITS[logits_rv.dtype], triton.cdiv(size, BLOCK)
    per_row = {"BITS": bits, "CHUNKS": triton.next_power_of_2(chunks), **options}
    per_chunk = {"SIZE": size, "BLOCK": BLOCK, "num_warps": WARPS, **options}
    cuts = logits_rv.new_empty(rows, _CUT.value, dtype=torch.float64)
    ends = logits_rv.new_empty(rows, chunks, 2, dtype=torch.float32)
    images = [logits_rv.new_empty(rows, steps, dtype=torch.int32) for steps in _STEPS]
    packed = draws.packed_r5
    _ends[(rows, chunks)](logits_rv, ends, stride, **per_chunk)
    _bracket[(rows,)](packed, ends, cuts, images[0], chunks, SIZE=size, STEPS=_STEPS[0], num_warps=1, **per_row)
    if not draws.filters:
        return cuts
    for this, steps, after in zip(images, _STEPS, (*images[1:], images[0][:, :0]), strict=True):
        amounts = logits_rv.new_empty(rows, chunks, steps, dtype=torch.float32)
        _amounts[(rows, chunks)](logits_rv, cuts, this, amounts, stride, BITS=bits, STEPS=steps, **per_chunk)
        sizes = {"FIRST": this is images[0], "STEPS": steps, "NEXT_STEPS": after.shape[1]}
        _narrow[(rows,)](packed, cuts, this, amounts, after, chunks, num_warps=4, **sizes, **per_row)
    return cuts
