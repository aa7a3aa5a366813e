"""Tokens drawn from rows of logits by temperature, min-p, top-k and top-p: see `hasten.ops.draw`.

No vocabulary is sorted. What filters keep is all that is not below some number, and that is found among the few numbers
of the row that are not below a bound. Probabilities are in fp64 and are not divided by their sum, so that the greatest
is 1. Addresses are of fp32 logits, of fp64 parameters and probabilities, and of int32 tokens.
"""

import numpy as np

from hasten.ops.draws import NONE_LEFT
from hasten.ops.native.code import wide
from hasten.ops.native.code.choice import _most
from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import load_f32, load_f64, load_i64, stack, store_f32, store_i32

_f64 = np.float64
_NONE_LEFT = NONE_LEFT
_LEAST = 5e-324
_BLOCK = 64
"""Probabilities that are added up together, before it is known which of them the draw ends in."""
_lanes = stack(32)


@part
def _exponentials(row, width, temperature, most, probs):
    """Probabilities times their sum, and zeros up to a multiple of 8; the sum."""
    divisor, greatest = wide.splat(temperature), wide.splat(_f64(most) / temperature)
    sums, whole = wide.splat(0.0), width // 8 * 8
    for at in range(0, whole, 8):
        value = wide.exp(wide.sub(wide.div(wide.widened(row + 4 * at), divisor), greatest))
        wide.store(probs + 8 * at, value)
        sums = wide.add(sums, value)
    if whole < width:
        rest = _lanes()
        for lane in range(8):
            store_f32(rest + 4 * lane, load_f32(row + 4 * (whole + lane)) if whole + lane < width else -np.inf)
        value = wide.exp(wide.sub(wide.div(wide.widened(rest), divisor), greatest))
        wide.store(probs + 8 * whole, value)
        sums = wide.add(sums, value)
    return wide.total(sums)


@part
def _kept_sum(probs, width, floor):
    """The sum of what is not below `floor`."""
    sums, floors = wide.splat(0.0), wide.splat(floor)
    for at in range(0, 8 * width, 64):
        sums = wide.add(sums, wide.kept(wide.load(probs + at), floors))
    return wide.total(sums)


@part
def _gathered(probs, width, bound, found):
    """Copy the numbers that are above 0 and not below `bound`, and zeros up to a multiple of 8; how many they are."""
    count, bounds = 0, wide.splat(max(bound, _LEAST))
    for at in range(0, 8 * width, 64):
        lanes = wide.where(wide.load(probs + at), bounds)
        if lanes:
            for lane in range(8):  # each is written, and the next one over it if it is not to be kept
                wide.store_f64(found + 8 * count, load_f64(probs + at + 8 * lane))
                count += (lanes >> lane) & 1
    for index in range(count, -(-count // 8) * 8):
        wide.store_f64(found + 8 * index, 0.0)
    return count


@part
def _maxima(probs, width, count, found):
    """The greatest numbers of parts of a row, at least `count` of them: how many they are; 0 where it has not as many.

    The `count`-th of them is a bound of the row's: as many of its numbers are not below it.
    """
    vectors = -(-width // 8)
    parts = -(-count // 8)
    if 2 * parts > vectors:
        return 0
    for number in range(parts):
        most = wide.splat(0.0)
        for vector in range(vectors * number // parts, vectors * (number + 1) // parts):
            most = wide.larger(most, wide.load(probs + 64 * vector))
        wide.store(found + 64 * number, most)
    return 8 * parts


@part
def _reached(numbers, count, target, by_sum):
    """The number with which the greatest of some positive numbers reach a target; the least where all of them do not.

    `target` is a count, or where `by_sum` a sum. Behind the numbers are zeros up to a multiple of 8.
    """
    greatest, least = wide.splat(0.0), wide.splat(np.inf)
    nothing = wide.splat(_LEAST)
    for at in range(0, 8 * count, 64):
        values = wide.load(numbers + at)
        greatest = wide.larger(greatest, values)
        least = wide.smaller(least, wide.kept_or(values, nothing, np.inf))
    low, high = wide.least(least), wide.most(greatest)
    while low < high:
        # between the two in the order of their bits, of which each turn halves the distance
        border = wide.from_bits(wide.bits(low) + (wide.bits(high) - wide.bits(low) + 1) // 2)
        borders, sums = wide.splat(border), wide.splat(0.0)
        above, below = wide.splat(np.inf), wide.splat(0.0)
        for at in range(0, 8 * count, 64):
            values = wide.load(numbers + at)
            sums = wide.add(sums, wide.kept(values, borders) if by_sum else wide.counted(values, borders))
            above = wide.smaller(above, wide.kept_or(values, borders, np.inf))
            below = wide.larger(below, wide.sub(values, wide.kept(values, borders)))
        if wide.total(sums) >= target:
            low = wide.least(above)
        else:
            high = wide.most(below)
    return low


@part
def _floor(probs, width, total, top_k, top_p, least, found):
    """The least probability that top-k, and then top-p among what is left, keep of what is not below `least`."""
    bound = least
    limited = 0 < top_k < width
    if limited:
        count = _maxima(probs, width, 2 * top_k, found)
        if count:
            bound = max(bound, _reached(found, count, _f64(top_k), False))
    elif top_p < 1:
        # what is below an even division of what top-p drops adds up to less than that
        if least > 0:
            total = _kept_sum(probs, width, least)
        bound = max(bound, (1 - top_p) * total / width)
    count = _gathered(probs, width, bound, found)
    if limited:
        if count >= top_k:
            least = max(least, _reached(found, count, _f64(top_k), False))
        if top_p < 1:
            total = 0.0
            for at in range(0, 8 * count, 8):
                value = load_f64(found + at)
                total += value if value >= least else 0.0
    if top_p < 1:
        least = max(least, _reached(found, count, top_p * total, True))
    return least


@part
def _inverted(probs, width, floor, point, sums):
    """Where the cumulative distribution of what is not below `floor` goes beyond `point`."""
    blocks, cumulative, end = -(-width // _BLOCK), 0.0, -(-width // 8) * 8
    for block in range(blocks):
        start = block * _BLOCK
        cumulative += _kept_sum(probs + 8 * start, min(_BLOCK, end - start), floor)
        wide.store_f64(sums + 8 * block, cumulative)
    target, last = point * cumulative, 0
    block = 0
    while block < blocks and not load_f64(sums + 8 * block) > target:
        block += 1
    if block == blocks:  # the point is so close to 1 that its product with the sum is the sum
        block = blocks - 1
        while block > 0 and load_f64(sums + 8 * (block - 1)) == cumulative:
            block -= 1
    cumulative = load_f64(sums + 8 * (block - 1)) if block else 0.0
    for index in range(block * _BLOCK, min(width, (block + 1) * _BLOCK)):
        value = load_f64(probs + 8 * index)
        is_kept = value >= floor and value > 0
        cumulative += value if is_kept else 0.0
        last = index if is_kept else last
        if cumulative > target:
            break
    return last


@kernel
def _draw(p, thread, threads):
    """Tokens [r] of rows [r, v], by parameters [r, 5]; scratch: twice a row of fp64 for each of the first threads.

    The parameters of rows, and those of one row, stand any number of bytes apart.
    """
    rows, width, x, stride = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    parameters, row_step, step = load_i64(p + 32), 8 * load_i64(p + 40), 8 * load_i64(p + 48)
    scratch, size, first, out = load_i64(p + 56), load_i64(p + 64), load_i64(p + 72), load_i64(p + 80)
    probs = scratch + 16 * size * thread
    found = probs + 8 * size
    threads = min(threads, first)
    for r in range(rows * thread // threads, min(rows, rows * (thread + 1) // threads)):
        row, own = x + r * stride, parameters + row_step * r
        most = _most(row, width)
        if most == -np.inf:
            token = np.int64(_NONE_LEFT)
        elif most != most or most == np.inf:
            token = np.int64(-1)
        else:
            top_k, top_p, floor = np.int64(load_f64(own + step)), load_f64(own + 2 * step), load_f64(own + 3 * step)
            total = _exponentials(row, width, load_f64(own), most, probs)
            if 0 < top_k < width or top_p < 1:
                floor = _floor(probs, width, total, top_k, top_p, floor, found)
            token = np.int64(_inverted(probs, width, floor, load_f64(own + 4 * step), found))
        store_i32(out + 4 * r, np.int32(token))
