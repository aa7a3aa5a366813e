"""Attention of single queries over the paged cache where its keys and values lie, and what goes into the cache.

Addresses are of fp32 numbers, but for block tables, which are int32, for lengths, rows, slots and positions, which are
int64, and for caches, which are fp32, or bf16 where `halves` is 1 instead of 0. A head has a multiple of 16 dimensions.
Each key is read once, for all query heads that share it.
"""

import numpy as np

from hasten.ops.native.code.functions import kernel, kernel_of, part
from hasten.ops.native.code.simd import (
    add,
    div,
    exp,
    first_lane,
    fma,
    lanes,
    larger,
    largest,
    load,
    load_f32,
    load_f64,
    load_halves,
    load_i32,
    load_i64,
    mul,
    splat,
    stack,
    store,
    store_f32,
    store_halves,
    sub,
    total,
)

_f32 = np.float32
_HEADS = 16
"""Most query heads at a time, as many as have room for their scores on the stack."""
_KEYS = 128
"""Keys whose scores are there at a time."""
NOTHING = _f32(-1e30)
"""Less than any score."""
_scores = stack(4 * _HEADS * _KEYS)
_largest = stack(4 * _HEADS)
_sums = stack(4 * _HEADS)


@part
def load_cached(at, halves):
    """16 numbers of a cache."""
    return load_halves(at) if halves else load(at)


@part
def _dot(query, key, size, halves):
    """Of heads of `size` bytes in fp32."""
    sums = mul(load(query), load_cached(key, halves))
    if size == 256:
        sums = fma(load(query + 64), load_cached(key + (64 >> halves), halves), sums)
        sums = fma(load(query + 128), load_cached(key + (128 >> halves), halves), sums)
        return total(fma(load(query + 192), load_cached(key + (192 >> halves), halves), sums))
    for at in range(64, size, 64):
        sums = fma(load(query + at), load_cached(key + (at >> halves), halves), sums)
    return total(sums)


@part
def _compare(query, keys, count, heads, shared, size, row, scores, halves):
    """Products of the heads of a query with the next `count` keys; the scores of a head are 128 words apart."""
    for key in range(count):
        at = keys + key * row
        for head in range(heads):
            score = _dot(query + head * size, at + (head // shared * size >> halves), size, halves)
            store_f32(scores + 4 * (128 * head + key), score)


@part
def adjust(line, count, scale, cap, slope, biases, farthest, distance):
    """Scale the scores of a head, cap them, and add what comes of the distances of their keys, the first's given.

    That is a slope times the distance, and a bias of those from -`farthest` to `farthest`, the ends standing for longer
    ones.
    """
    scales = splat(scale)
    if cap:
        for at in range(0, 4 * count, 64):
            inner = mul(load(line + at), splat(_f32(2) * scale / cap))
            # tanh x = 1 - 2 / (e^2x + 1)
            part_of_two = div(splat(_f32(2)), add(exp(inner), splat(_f32(1))))
            store(line + at, mul(sub(splat(_f32(1)), part_of_two), splat(cap)))
        scales = splat(_f32(1))
    for at in range(0, 4 * count, 64):
        store(line + at, mul(load(line + at), scales))
    if slope:
        slopes = splat(slope)
        for at in range(0, 4 * count, 64):
            distances = add(splat(_f32(distance + at // 4)), lanes())
            store(line + at, add(load(line + at), mul(slopes, distances)))
    if biases:
        _add_biases(line, count, biases, farthest, distance)


@part
def _add_biases(line, count, biases, farthest, distance):
    number = 0
    while number < count and distance + number < -farthest:
        store_f32(line + 4 * number, load_f32(line + 4 * number) + load_f32(biases))
        number += 1
    while number + 16 <= count and distance + number + 15 <= farthest:
        at = line + 4 * number
        store(at, add(load(at), load(biases + 4 * (distance + number + farthest))))
        number += 16
    for rest in range(number, count):
        at = line + 4 * rest
        store_f32(at, load_f32(at) + load_f32(biases + 4 * (min(distance + rest, farthest) + farthest)))


@part
def softened(line, count, most):
    """Exponentials of scores less the largest so far, in place: their sum. Behind them are scores of nothing."""
    sums, subtracted = splat(_f32(0)), splat(most)
    for at in range(0, 4 * count, 64):
        power = exp(sub(load(line + at), subtracted))
        store(line + at, power)
        sums = add(sums, power)
    return total(sums)


@part
def _weigh(values, row, weights, count, out, size, halves):
    """Add `count` values, `row` bytes apart, times their weights to a head of `size` bytes in fp32."""
    whole = size // 256 * 256
    for piece in range(0, whole, 256):
        a, b, c, d = load(out + piece), load(out + piece + 64), load(out + piece + 128), load(out + piece + 192)
        at = values + (piece >> halves)
        for key in range(count):
            weight = splat(load_f32(weights + 4 * key))
            a = fma(weight, load_cached(at, halves), a)
            b = fma(weight, load_cached(at + (64 >> halves), halves), b)
            c = fma(weight, load_cached(at + (128 >> halves), halves), c)
            d = fma(weight, load_cached(at + (192 >> halves), halves), d)
            at += row
        store(out + piece, a)
        store(out + piece + 64, b)
        store(out + piece + 128, c)
        store(out + piece + 192, d)
    for piece in range(whole, size, 64):
        sums, at = load(out + piece), values + (piece >> halves)
        for key in range(count):
            sums, at = fma(splat(load_f32(weights + 4 * key)), load_cached(at, halves), sums), at + row
        store(out + piece, sums)


@part
def scale_head(out, factor, size):
    """Multiply the numbers of a head, of `size` bytes, in place."""
    factors = splat(factor)
    for at in range(0, size, 64):
        store(out + at, mul(load(out + at), factors))


@part
def _attend(
    query,
    keys,
    values,
    table,
    begin,
    end,
    block,
    heads,
    shared,
    size,
    row,
    slopes,
    sinks,
    biases,
    farthest,
    scale,
    cap,
    out,
    halves,
):
    """Up to `_HEADS` heads of one query over keys `begin` to `end` of its sequence; of keys, rows of `row` bytes.

    `shared`: query heads that share a key head; the first of `heads` is the first of its keys' too.
    """
    scores, tops, sums = _scores(), _largest(), _sums()
    for head in range(heads):
        store_f32(tops + 4 * head, load_f32(sinks + 4 * head) if sinks else NOTHING)
        store_f32(sums + 4 * head, _f32(1) if sinks else _f32(0))
        for at in range(head * size, (head + 1) * size, 64):
            store(out + at, splat(_f32(0)))
    first = begin
    while first < end:
        last = min(end, (first // block + max(1, 128 // block)) * block, first + 128)
        count = last - first
        whole = (count + 15) // 16 * 16
        key = first
        while key < last:
            until = min(last, (key // block + 1) * block)
            at = keys + (np.int64(load_i32(table + 4 * (key // block))) * block + key % block) * row
            _compare(query, at, until - key, heads, shared, size, row, scores + 4 * (key - first), halves)
            key = until
        for head in range(heads):
            line = scores + 512 * head
            slope = load_f32(slopes + 4 * head) if slopes else _f32(0)
            own = biases + 4 * (2 * farthest + 1) * head if biases else 0
            adjust(line, count, scale, cap, slope, own, farthest, first - end + 1)
            for at in range(count, whole):
                store_f32(line + 4 * at, NOTHING)
            top = load(line)
            for at in range(64, 4 * whole, 64):
                top = larger(top, load(line + at))
            before = load_f32(tops + 4 * head)
            most = max(before, largest(top))
            added = softened(line, whole, most)
            if most > before:
                factor = first_lane(exp(splat(before - most)))
                store_f32(tops + 4 * head, most)
                store_f32(sums + 4 * head, load_f32(sums + 4 * head) * factor + added)
                if first > begin:
                    scale_head(out + head * size, factor, size)
            else:
                store_f32(sums + 4 * head, load_f32(sums + 4 * head) + added)
        key = first
        while key < last:
            until = min(last, (key // block + 1) * block)
            at = values + (np.int64(load_i32(table + 4 * (key // block))) * block + key % block) * row
            for head in range(heads):
                weights = scores + 4 * (128 * head + key - first)
                own = at + (head // shared * size >> halves)
                _weigh(own, row, weights, until - key, out + head * size, size, halves)
            key = until
        first = last
    for head in range(heads):
        scale_head(out + head * size, _f32(1) / load_f32(sums + 4 * head), size)


@part
def _attend_all(p, thread, threads, halves):
    count, key_heads, shared, size = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    block, width, window = load_i64(p + 32), load_i64(p + 40), load_i64(p + 48)
    queries, query_stride, keys, values = load_i64(p + 56), 4 * load_i64(p + 64), load_i64(p + 72), load_i64(p + 80)
    tables, rows, lengths, slopes = load_i64(p + 88), load_i64(p + 96), load_i64(p + 104), load_i64(p + 112)
    sinks, out, out_stride, numbers = load_i64(p + 120), load_i64(p + 128), 4 * load_i64(p + 136), load_i64(p + 144)
    biases, farthest = load_i64(p + 152), load_i64(p + 160)
    scale, cap = _f32(load_f64(p + 168)), _f32(load_f64(p + 176))
    row = key_heads * size >> halves
    most = max(1, 16 // shared)
    unit, ends = count * key_heads * thread // threads, count * key_heads * (thread + 1) // threads
    while unit < ends:
        sequence, head = unit // key_heads, unit % key_heads
        together = min(most, key_heads - head, ends - unit)
        length = load_i64(lengths + 8 * sequence)
        begin = max(0, length - window) if window > 0 else 0
        table = tables + 4 * width * load_i64(rows + 8 * sequence)
        at = load_i64(numbers + 8 * sequence) if numbers else sequence
        first = head * shared
        to = out + at * out_stride + first * size
        if length == 0:
            for zeroed in range(to, to + together * shared * size, 64):
                store(zeroed, splat(_f32(0)))
        else:
            _attend(
                queries + at * query_stride + first * size,
                keys + (head * size >> halves),
                values + (head * size >> halves),
                table,
                begin,
                length,
                block,
                together * shared,
                shared,
                size,
                row,
                slopes + 4 * first if slopes else 0,
                sinks + 4 * first if sinks else 0,
                biases + 4 * (2 * farthest + 1) * first if biases else 0,
                farthest,
                scale,
                cap,
                to,
                halves,
            )
        unit += together


@kernel
def _attention(p, thread, threads):
    """Single queries [s, n, d] of sequences with `lengths` [s] keys, whose blocks are `tables[rows]`: out [s, n, d].

    A sequence without keys gets zeros.
    """
    _attend_all(p, thread, threads, 0)


@kernel_of("bf16")
def _half_attention(p, thread, threads):
    """As `attention`, with caches in bf16."""
    _attend_all(p, thread, threads, 1)


@part
def _turn(head, table, half, interleaved):
    """Turn the first 2 * `half` dimensions of a head in place, by `half` cosines and as many sines."""
    if not interleaved and half % 16 == 0:
        for at in range(0, 4 * half, 64):
            a, b, cos, sin = load(head + at), load(head + 4 * half + at), load(table + at), load(table + 4 * half + at)
            store(head + at, sub(mul(a, cos), mul(b, sin)))
            store(head + 4 * half + at, add(mul(b, cos), mul(a, sin)))
        return
    step, apart = (8, 4) if interleaved else (4, 4 * half)
    for number in range(half):
        left, right = head + step * number, head + step * number + apart
        cosine, sine = load_f32(table + 4 * number), load_f32(table + 4 * (half + number))
        x, y = load_f32(left), load_f32(right)
        store_f32(left, x * cosine - y * sine)
        store_f32(right, y * cosine + x * sine)


@part
def _keep(source, to, halves):
    """Put 16 numbers into a cache."""
    if halves:
        store_halves(to, load(source))
    else:
        store(to, load(source))


@part
def _store_all(p, thread, threads, halves):
    count, heads, key_heads, size = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    qkv, stride, keys, values = load_i64(p + 32), 4 * load_i64(p + 40), load_i64(p + 48), load_i64(p + 56)
    slots, table, positions, half = load_i64(p + 64), load_i64(p + 72), load_i64(p + 80), load_i64(p + 88)
    interleaved = load_i64(p + 96)
    row = key_heads * size
    for t in range(count * thread // threads, count * (thread + 1) // threads):
        own = qkv + t * stride
        if table:
            angles = table + 8 * half * load_i64(positions + 8 * t)
            for head in range(heads + key_heads):
                _turn(own + head * size, angles, half, interleaved)
        slot = load_i64(slots + 8 * t)
        if slot >= 0:
            from_key = own + heads * size
            for at in range(0, row, 64):
                to = slot * row + at >> halves
                _keep(from_key + at, keys + to, halves)
                _keep(from_key + row + at, values + to, halves)


@kernel
def _store(p, thread, threads):
    """Turn the queries and keys of a fused projection in place, and put its keys and values into the cache."""
    _store_all(p, thread, threads, 0)


@kernel_of("bf16")
def _half_store(p, thread, threads):
    """As `store`, with caches in bf16."""
    _store_all(p, thread, threads, 1)
