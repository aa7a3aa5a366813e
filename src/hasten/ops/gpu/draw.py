"""Drawing tokens. Shapes: r rows, v vocabulary, b logits of a block; c chunks of a row, n candidates of a chunk.

The last pass over the logits (`cuts.py` has those before) writes the candidates down, which may be where a row is cut,
with what lies above them. A single program per row then finds the cut among them and inverts the distribution. Where a
chunk has more candidates than there is room for, it looks for the cut in the logits themselves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.draws import NONE_LEFT, Draws
from hasten.ops.gpu import cuts as cutting
from hasten.ops.gpu.cuts import _BY_COUNT, _CUT, CONSTANT_BITS, _find_cuts, _finite, _value
from hasten.ops.gpu.launch import overlapped, wait_for_inputs

_CANDIDATES = 16384
"""Of one row, all of which a program holds in its registers."""
_GROUP = tl.constexpr(8)
"""Logits whose candidates are counted together: those that a thread loads at once, in half types."""
_NONE_LEFT = tl.constexpr(NONE_LEFT)


@triton.jit
def _mean(low, high):
    """Rounded down; their sum could overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _collect(
    logits,
    cuts,
    above,
    candidates,
    stride,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A chunk's logits where the cut may be, as many as there is room for; weight and number of those above."""
    wait_for_inputs(PDL)
    r, c, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    cut = cuts + r * _CUT
    if tl.load(cut + 5) >= 0:
        best, sharpness = tl.load(cut).to(tl.float32), tl.load(cut + 1).to(tl.float32)
        low, high = tl.load(cut + 2).to(tl.int32), tl.load(cut + 3).to(tl.int32)
        x_b = _finite(logits + r * stride, c * BLOCK + tl.arange(0, BLOCK), SIZE)
        above_b = x_b >= _value(tl.where(low < high, high + 1, low), BITS)
        own = above + (r * chunks + c) * 3
        tl.store(own, tl.sum(tl.where(above_b, tl.exp2((x_b - best) * sharpness), 0.0), 0))
        tl.store(own + 1, tl.sum(above_b.to(tl.int32), 0).to(tl.float32))
        within_b = ((x_b >= _value(low, BITS)) & (low < high) & (above_b == 0)).to(tl.int32)
        count = tl.sum(within_b, 0)
        tl.store(own + 2, count.to(tl.float32))
        if count > 0:
            # Counting in groups first: most of the work of a sum over all before is between threads.
            within_gs = tl.reshape(within_b, [BLOCK // _GROUP, _GROUP])
            count_g = tl.sum(within_gs, 1)
            before_g = tl.cumsum(count_g, 0) - count_g
            at_gs = before_g[:, None] + tl.cumsum(within_gs, 1) - 1
            own_candidates = candidates + (r * chunks + c) * ROOM
            x_gs = tl.reshape(x_b, [BLOCK // _GROUP, _GROUP])
            tl.store(own_candidates + at_gs, x_gs, (within_gs > 0) & (at_gs < ROOM))


@triton.jit
def _floor_among(x_cn, amount_cn, above, low, high, limit, BITS: tl.constexpr):
    """The least image between two above which there is less than `limit`, by all logits between them."""
    while low < high:
        middle = _mean(low, high)
        kept_cn = tl.where(x_cn >= _value(middle + 1, BITS), amount_cn, 0.0)
        reached = above + tl.sum(tl.sum(kept_cn.to(tl.float64), 1), 0) >= limit
        low = tl.where(reached, middle + 1, low)
        high = tl.where(reached, high, middle)
    return low


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
def _token_of_block(
    row, start, floor, target, best, sharpness, SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The last token of a block with a weight such that no more than `target` lies before it in the block."""
    tokens_b = start + tl.arange(0, BLOCK)
    weight_b = _weights(row, tokens_b, floor, best, sharpness, SIZE, BITS)
    before_b = tl.cumsum(weight_b, 0) - weight_b
    return tl.max(tl.where((weight_b > 0) & (before_b <= target), tokens_b, -1), 0)


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
    return _token_of_block(row, block, floor, target - before_block, best, sharpness, SIZE, BITS, BLOCK)


@triton.jit
def _floor_of_row(
    row, low, high, limit, top_p, best, sharpness, kind, SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The image that a row is cut at, between two, found in its logits."""
    floor = low
    if kind == _BY_COUNT:
        floor = _floor(row, low, high, limit, best, sharpness, False, SIZE, BITS, BLOCK)
        if top_p < 1:
            total, _, _ = _amounts_from(row, floor, floor, floor, best, sharpness, True, True, SIZE, BITS, BLOCK)
            floor = _floor(row, floor, high, top_p * total, best, sharpness, True, SIZE, BITS, BLOCK)
    else:
        floor = _floor(row, low, high, limit, best, sharpness, True, SIZE, BITS, BLOCK)
    return floor


@triton.jit
def _floor_of_candidates(x_cn, weight_cn, count, mass, low, high, limit, top_p, kind, BITS: tl.constexpr):
    """The same, found among the candidates, with the number of logits above them and the sum of their weights."""
    floor = low
    if kind == _BY_COUNT:
        floor = _floor_among(x_cn, weight_cn * 0 + 1, count, low, high, limit, BITS)
        if top_p < 1:
            kept_cn = tl.where(x_cn >= _value(floor, BITS), weight_cn, 0.0)
            limit = top_p * tl.sum(tl.sum(kept_cn.to(tl.float64), 1), 0)
            floor = _floor_among(x_cn, weight_cn, mass, floor, high, limit, BITS)
    else:
        floor = _floor_among(x_cn, weight_cn, mass, low, high, limit, BITS)
    return floor


@triton.jit
def _draw(
    logits,
    draws,
    cuts,
    above,
    candidates,
    tokens,
    stride,
    chunks,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROOM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: find the cut among the candidates, and invert what is left at the row's point."""
    wait_for_inputs(PDL)
    r, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    row, cut, own_c = logits + r * stride, cuts + r * _CUT, above + (r * chunks + c) * 3
    top_p, point = tl.load(draws + r * 5 + 2), tl.load(draws + r * 5 + 4)
    best, sharpness = tl.load(cut).to(tl.float32), tl.load(cut + 1).to(tl.float32)
    low, high = tl.load(cut + 2).to(tl.int32), tl.load(cut + 3).to(tl.int32)
    limit, kind = tl.load(cut + 4), tl.load(cut + 5)
    token = tl.where(best < 0, _NONE_LEFT, -1)
    if kind >= 0:
        mass_c = tl.load(own_c, c < chunks, 0.0).to(tl.float64)
        count = tl.sum(tl.load(own_c + 1, c < chunks, 0.0).to(tl.float64), 0)
        candidates_c = tl.load(own_c + 2, c < chunks, 0.0).to(tl.int32)
        if tl.max(candidates_c, 0) > ROOM:
            floor = _floor_of_row(row, low, high, limit, top_p, best, sharpness, kind, SIZE, BITS, BLOCK)
            total, _, _ = _amounts_from(row, floor, floor, floor, best, sharpness, True, True, SIZE, BITS, BLOCK)
            token = _token_at(row, floor, point * total, best, sharpness, SIZE, BITS, BLOCK)
        else:
            floor = low
            if low < high:
                n = tl.arange(0, ROOM)
                at_cn = (r * chunks + c[:, None]) * ROOM + n[None, :]
                x_cn = tl.load(candidates + at_cn, n[None, :] < candidates_c[:, None], float("-inf"))
                weight_cn = tl.exp2((x_cn - best) * sharpness)
                mass = tl.sum(mass_c, 0)
                floor = _floor_of_candidates(x_cn, weight_cn, count, mass, low, high, limit, top_p, kind, BITS)
                kept_cn = tl.where(x_cn >= _value(floor, BITS), weight_cn, 0.0)
                mass_c += tl.sum(kept_cn.to(tl.float64), 1)
            target = point * tl.sum(mass_c, 0)
            before_c = tl.cumsum(mass_c, 0) - mass_c
            chunk = tl.max(tl.where((mass_c > 0) & (before_c <= target), c, 0), 0)
            target -= tl.sum(tl.where(c == chunk, before_c, 0.0), 0)
            token = _token_of_block(row, chunk * BLOCK, floor, target, best, sharpness, SIZE, BITS, BLOCK)
    tl.store(tokens + r, token)


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:
    rows, size = logits_rv.shape
    assert logits_rv.stride(1) == 1
    assert draws.packed_r5.shape == (rows, 5)
    bits, chunks, options = CONSTANT_BITS[logits_rv.dtype], triton.cdiv(size, cutting.BLOCK), overlapped(logits_rv)
    padded = triton.next_power_of_2(chunks)
    room = min(cutting.BLOCK, max(1, _CANDIDATES // padded))
    cuts = _find_cuts(logits_rv, draws)
    above = logits_rv.new_empty(rows, chunks, 3, dtype=torch.float32)
    candidates = logits_rv.new_empty(rows, chunks if draws.filters else 0, room, dtype=torch.float32)
    tokens_r, stride = logits_rv.new_empty(rows, dtype=torch.int32), logits_rv.stride(0)
    sizes = {"SIZE": size, "BITS": bits, "BLOCK": cutting.BLOCK, "ROOM": room}
    _collect[(rows, chunks)](logits_rv, cuts, above, candidates, stride, **sizes, num_warps=cutting.WARPS, **options)
    _draw[(rows,)](
        logits_rv,
        draws.packed_r5,
        cuts,
        above,
        candidates,
        tokens_r,
        stride,
        chunks,
        CHUNKS=padded,
        num_warps=16,
        **sizes,
        **options,
    )
    return tokens_r
