"""Attention of the queries of prompts over the paged cache. Addresses are as in `attention.py`.

Up to 8 queries of a head are multiplied with up to 128 keys at a time, and the weights that come of it with as many
values, by the loops of `products.py`: so keys and values are laid out as panels of 32 features, which are the keys for
the scores and the dimensions for the result. This is done once for all queries of a unit of work that see them, those
of all heads that share a key head. A query's sums have the same order in any batch. Source: Dao, "FlashAttention-2",
2023.
"""

import numpy as np

from hasten.ops.native.code.attention import NOTHING, adjust, load_cached, scale_head, softened
from hasten.ops.native.code.functions import kernel, kernel_of, part
from hasten.ops.native.code.products import multiply
from hasten.ops.native.code.simd import (
    add,
    exp,
    first_lane,
    larger,
    largest,
    load,
    load_f32,
    load_f64,
    load_i32,
    load_i64,
    splat,
    stack,
    store,
    store_f32,
    transpose,
)

_f32 = np.float32
_KEYS = 128
"""Most keys at a time."""
_QUERIES = 8
"""Most queries of a head at a time."""
_ROWS = 256
"""Queries of a unit of work, times the heads that share a key head."""
_ELEMENTS = 1 << 14
"""Of keys, and of values, at a time: together they take half of a small L2 cache."""
_HEAD = 512
"""Largest head size, as large as has room on the stack."""
_key_panels = stack(4 * _ELEMENTS)
_value_panels = stack(4 * _ELEMENTS)
_sixteen = stack(4 * 16 * _HEAD)
_queries = stack(4 * _QUERIES * _HEAD)
_tile = stack(4 * _QUERIES * 32)
_lines = stack(4 * _QUERIES * _KEYS)
_largest = stack(4 * _ROWS)
_sums = stack(4 * _ROWS)


@part
def _clear(at, size):
    for address in range(at, at + size, 64):
        store(address, splat(_f32(0)))


@part
def _copy(source, target, size):
    for at in range(0, size, 64):
        store(target + at, load(source + at))


@part
def _widen(source, target, size, halves):
    """Copy a head of a cache, of `size` bytes in fp32."""
    for at in range(0, size, 64):
        store(target + at, load_cached(source + (at >> halves), halves))


@part
def _lay_out_keys(keys, table, block, row, first, count, size, rows, panels, halves):
    """Keys from number `first` on, of `size` bytes, as panels of 32 keys: [panels, d, 32]; zeros behind the last.

    `rows`: room for 16 keys.
    """
    for begin in range(0, (count + 31) // 32 * 32, 16):
        for number in range(16):
            key = first + begin + number
            if begin + number < count:
                slot = np.int64(load_i32(table + 4 * (key // block))) * block + key % block
                _widen(keys + slot * row, rows + number * size, size, halves)
            else:
                _clear(rows + number * size, size)
        to = panels + begin // 32 * 32 * size + 4 * (begin % 32)
        for at in range(0, size, 64):
            transpose(rows + at, size, to + 32 * at, 128)


@part
def _lay_out_values(values, table, block, row, first, count, size, panels, halves):
    """Values of the same keys as panels of 32 dimensions: [panels, keys, 32], with zeros behind the last dimension."""
    for number in range(count):
        key = first + number
        slot = np.int64(load_i32(table + 4 * (key // block))) * block + key % block
        source = values + slot * row
        for at in range(0, size, 64):
            to = panels + at // 128 * 128 * count + 128 * number + at % 128
            store(to, load_cached(source + (at >> halves), halves))
        if size % 128:
            store(panels + size // 128 * 128 * count + 128 * number + 64, splat(_f32(0)))


@part
def _product(x, stride, panel, inputs, tile, rows):
    """Multiply up to 8 rows by a panel."""
    done = 0
    while done < rows:
        done += multiply(x + done * stride, stride, panel, inputs, tile + 128 * done, rows - done)


@part
def _weights(line, low, high, before):
    """Weights of a query's scores from `low` to `high`, where `before` was the largest score so far, in place.

    They are exponentials of scores less the largest, which follows the line; zeros in the rest of its last vector, and
    before the first. Their sum comes back.
    """
    whole = (high + 15) // 16 * 16
    for number in range(low):
        store_f32(line + 4 * number, NOTHING)
    for number in range(high, whole):
        store_f32(line + 4 * number, NOTHING)
    tops = load(line)
    for at in range(64, 4 * whole, 64):
        tops = larger(tops, load(line + at))
    top = max(before, largest(tops))
    total = softened(line, whole, top)
    for number in range(low):
        store_f32(line + 4 * number, _f32(0))
    for number in range(high, whole):
        store_f32(line + 4 * number, _f32(0))
    return top, total


@part
def _attend_tile(
    query,
    query_stride,
    rows,
    first,
    count,
    position,
    size,
    key_panels,
    value_panels,
    slope,
    biases,
    farthest,
    window,
    causal,
    scale,
    cap,
    tops,
    sums,
    out,
    out_stride,
):
    """Up to 8 queries of a head, the first at `position`, over `count` keys from `first` on, which are laid out."""
    queries, tile, lines = _queries(), _tile(), _lines()
    seen = max(0, min(count, position + rows - first)) if causal else count
    if not causal and window > 0:
        seen = max(0, min(count, position + rows - 1 + window - first))
    if seen == 0 or (window > 0 and position - window + 1 >= first + seen):
        return
    for number in range(rows):
        _copy(query + number * query_stride, queries + number * size, size)
    for panel in range(0, seen, 32):
        _product(queries, size, key_panels + panel * size, size // 4, tile, rows)
        for number in range(rows):
            _copy(tile + 128 * number, lines + 512 * number + 4 * panel, 128)
    for number in range(rows):
        own, line = position + number, lines + 512 * number
        low = min(seen, max(0, own - window + 1 - first)) if window > 0 else 0
        high = seen
        if causal:
            high = max(0, min(seen, own + 1 - first))
        elif window > 0:
            high = max(0, min(seen, own + window - first))
        if high <= low:
            _clear(line, 4 * ((seen + 15) // 16 * 16))
        else:
            adjust(line, (high + 15) // 16 * 16, scale, cap, slope, biases, farthest, first - own)
            before = load_f32(tops + 4 * number)
            top, total = _weights(line, low, high, before)
            for at in range((high + 15) // 16 * 64, 4 * seen, 64):
                store(line + at, splat(_f32(0)))
            if top > before:
                factor = first_lane(exp(splat(before - top)))
                store_f32(tops + 4 * number, top)
                store_f32(sums + 4 * number, load_f32(sums + 4 * number) * factor + total)
                scale_head(out + number * out_stride, factor, size)
            else:
                store_f32(sums + 4 * number, load_f32(sums + 4 * number) + total)
    for panel in range(0, size, 128):
        _product(lines, 512, value_panels + panel * count, seen, tile, rows)
        for number in range(rows):
            to = out + number * out_stride + panel
            for at in range(0, min(128, size - panel), 64):
                store(to + at, add(load(to + at), load(tile + 128 * number + at)))


@part
def _attend(
    query,
    query_stride,
    queries,
    shared,
    position,
    length,
    keys,
    values,
    table,
    block,
    size,
    row,
    slopes,
    sinks,
    biases,
    farthest,
    window,
    causal,
    scale,
    cap,
    out,
    out_stride,
    halves,
):
    """`queries` of the `shared` heads of a key head, the first at `position`, in a sequence of `length` keys."""
    key_panels, value_panels, rows = _key_panels(), _value_panels(), _sixteen()
    tops, sums = _largest(), _sums()
    for head in range(shared):
        for number in range(queries):
            at = 4 * (head * queries + number)
            store_f32(tops + at, load_f32(sinks + 4 * head) if sinks else NOTHING)
            store_f32(sums + at, _f32(1) if sinks else _f32(0))
            _clear(out + number * out_stride + head * size, size)
    end = length
    if causal:
        end = min(length, position + queries)
    elif window > 0:
        end = min(length, position + queries - 1 + window)
    first = max(0, position - window + 1) // _KEYS * _KEYS if window > 0 else 0
    together = min(_KEYS, 4 * _ELEMENTS // ((size + 127) // 128 * 128) // 32 * 32)
    while first < end:
        count = min(together, end - first)
        _lay_out_keys(keys, table, block, row, first, count, size, rows, key_panels, halves)
        _lay_out_values(values, table, block, row, first, count, size, value_panels, halves)
        for head in range(shared):
            for number in range(0, queries, _QUERIES):
                at = 4 * (head * queries + number)
                _attend_tile(
                    query + number * query_stride + head * size,
                    query_stride,
                    min(_QUERIES, queries - number),
                    first,
                    count,
                    position + number,
                    size,
                    key_panels,
                    value_panels,
                    load_f32(slopes + 4 * head) if slopes else _f32(0),
                    biases + 4 * (2 * farthest + 1) * head if biases else 0,
                    farthest,
                    window,
                    causal,
                    scale,
                    cap,
                    tops + at,
                    sums + at,
                    out + number * out_stride + head * size,
                    out_stride,
                )
        first += count
    for head in range(shared):
        for number in range(queries):
            total = load_f32(sums + 4 * (head * queries + number))
            if total > 0:
                scale_head(out + number * out_stride + head * size, _f32(1) / total, size)


@part
def _attend_all(p, thread, threads, halves):
    sequences, key_heads, shared, size = load_i64(p), load_i64(p + 8), load_i64(p + 16), 4 * load_i64(p + 24)
    block, width, window, causal = load_i64(p + 32), load_i64(p + 40), load_i64(p + 48), load_i64(p + 56)
    queries, query_stride, keys, values = load_i64(p + 64), 4 * load_i64(p + 72), load_i64(p + 80), load_i64(p + 88)
    tables, rows, lengths, firsts = load_i64(p + 96), load_i64(p + 104), load_i64(p + 112), load_i64(p + 120)
    counts, slopes, sinks, out = load_i64(p + 128), load_i64(p + 136), load_i64(p + 144), load_i64(p + 152)
    out_stride, biases, farthest = 4 * load_i64(p + 160), load_i64(p + 168), load_i64(p + 176)
    scale, cap = _f32(load_f64(p + 184)), _f32(load_f64(p + 192))
    most, unit = max(_QUERIES, _ROWS // shared // _QUERIES * _QUERIES), 0
    for sequence in range(sequences):
        count, length = load_i64(counts + 8 * sequence), load_i64(lengths + 8 * sequence)
        at, table = load_i64(firsts + 8 * sequence), tables + 4 * width * load_i64(rows + 8 * sequence)
        for begin in range(0, count, most):
            for head in range(key_heads):
                if unit % threads == thread:
                    first = head * shared
                    _attend(
                        queries + (at + begin) * query_stride + first * size,
                        query_stride,
                        min(most, count - begin),
                        shared,
                        length - count + begin,
                        length,
                        keys + (head * size >> halves),
                        values + (head * size >> halves),
                        table,
                        block,
                        size,
                        key_heads * size >> halves,
                        slopes + 4 * first if slopes else 0,
                        sinks + 4 * first if sinks else 0,
                        biases + 4 * (2 * farthest + 1) * first if biases else 0,
                        farthest,
                        window,
                        causal,
                        scale,
                        cap,
                        out + (at + begin) * out_stride + first * size,
                        out_stride,
                        halves,
                    )
                unit += 1


@kernel
def _prompts(p, thread, threads):
    """The queries of sequences, [., n, d], of which sequence s has `counts[s]` from number `firsts[s]` on: out alike.

    They are the last tokens of its `lengths[s]` keys, whose blocks are `tables[rows[s]]`. A query without keys gets
    zeros.
    """
    _attend_all(p, thread, threads, 0)


@kernel_of("bf16")
def _half_prompts(p, thread, threads):
    """As `prompts`, with caches in bf16."""
    _attend_all(p, thread, threads, 1)
