"""Attention over the paged cache, for any mixture of prompts, chunks and single tokens.

Shapes: t tokens, n query heads, m key/value heads, d head size. Caches are [blocks, block size, m, d] in any strides
but a unit one for d. The host divides the work (`plan.py`): single tokens by splits of their keys, several by tiles.
Queries without keys get zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.meta import AttentionMeta
from hasten.ops.plan import SPLIT_COLUMNS, TILE, TILE_COLUMNS

_LOG2_E = 1.4426950408889634
_FAR = tl.constexpr(-1.0e30)
"""Below every score, and finite, so that the difference of two of them is a number."""


@triton.jit
def _capped(score, cap):
    """Cap * tanh(score / cap), by the logistic function; a large score leads to cap and not to infinity."""
    return cap * (2 / (1 + tl.exp(-2 * (score / cap))) - 1)


@triton.jit
def _add_up(part_sums, part_weights, first, parts, STEP: tl.constexpr, BLOCK_D: tl.constexpr):
    """The parts of one softmax, STEP places from each other, that other programs wrote: their sum [d] and weight."""
    top = _FAR
    weight = 0.0
    sum_d = tl.zeros([BLOCK_D], tl.float32)
    for number in range(parts):
        place = first + number * STEP
        their_top = tl.load(part_weights + place * 2, cache_modifier=".cg")
        their_weight = tl.load(part_weights + place * 2 + 1, cache_modifier=".cg")
        their_sum_d = tl.load(part_sums + place * BLOCK_D, cache_modifier=".cg")
        new = tl.maximum(top, their_top)
        weight = weight * tl.exp2(top - new) + their_weight * tl.exp2(their_top - new)
        sum_d = sum_d * tl.exp2(top - new) + their_sum_d * tl.exp2(their_top - new)
        top = new
    return sum_d, weight


@triton.jit
def _one_query(
    query,
    keys,
    values,
    slopes,
    tables,
    items,
    out,
    part_sums,
    part_weights,
    arrived,
    query_stride,
    block_stride,
    token_stride,
    head_stride,
    scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query of one head against a split of the keys.

    Each of BLOCK_N lanes of keys keeps its own running softmax, so that nothing crosses lanes before the end. The
    program that finishes last among the splits of a query adds them up.
    """
    start_next(PDL)
    head = tl.program_id(0)
    place = tl.program_id(1)
    item = items + place * COLUMNS
    table = tables + tl.load(item)
    query_row = tl.load(item + 1).to(tl.int64)
    out_row = tl.load(item + 2).to(tl.int64)
    begin = tl.load(item + 3)
    end = tl.load(item + 4)
    length = tl.load(item + 5)
    part = tl.load(item + 6)
    parts = tl.load(item + 7)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head).to(tl.float32) * 1.4426950408889634
    base = (head // GROUP).to(tl.int64) * head_stride
    wait_for_inputs(PDL)
    if parts > 0:
        q_d = tl.load(query + query_row * query_stride + head * D + d, in_head, 0.0).to(tl.float32) * scale
        top_n = tl.full([BLOCK_N], _FAR, tl.float32)
        weight_n = tl.zeros([BLOCK_N], tl.float32)
        sum_nd = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        lane_nd = (n * token_stride)[:, None] + d[None, :]
        if WINDOW:
            begin = tl.maximum(begin, tl.minimum(end, tl.maximum(length - WINDOW, 0) // BLOCK_N * BLOCK_N))
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            held = start + n < end
            if BLOCK_SIZE % BLOCK_N == 0:
                block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
                first = base + block * block_stride + (start % BLOCK_SIZE) * token_stride
                k_start = keys + first + lane_nd
                v_start = values + first + lane_nd
            else:
                block_n = tl.load(table + (start + n) // BLOCK_SIZE, held, 0).to(tl.int64)
                at_n = base + block_n * block_stride + ((start + n) % BLOCK_SIZE) * token_stride
                k_start = keys + at_n[:, None] + d[None, :]
                v_start = values + at_n[:, None] + d[None, :]
            mask_nd = held[:, None] & in_head[None, :]
            k_nd = tl.load(k_start, mask_nd, 0.0)
            v_nd = tl.load(v_start, mask_nd, 0.0)
            score_n = tl.sum(k_nd.to(tl.float32) * q_d[None, :], 1)
            if CAPPED:
                score_n = _capped(score_n, cap)
            score_n += slope * (start + n - (length - 1)).to(tl.float32)
            if WINDOW:
                held = held & (start + n >= length - WINDOW)
            score_n = tl.where(held, score_n, _FAR)
            new_n = tl.maximum(top_n, score_n)
            decay_n = tl.exp2(top_n - new_n)
            p_n = tl.where(held, tl.exp2(score_n - new_n), 0.0)
            weight_n = weight_n * decay_n + p_n
            sum_nd = sum_nd * decay_n[:, None] + p_n[:, None] * v_nd.to(tl.float32)
            top_n = new_n
        top = tl.max(top_n, 0)
        decay_n = tl.exp2(top_n - top)
        weight = tl.sum(weight_n * decay_n, 0)
        sum_d = tl.sum(sum_nd * decay_n[:, None], 0)
        target = out + (out_row * HEADS + head) * D + d
        if parts == 1:
            # A weight is at least 1, that of the greatest score, or 0 where there are no keys.
            tl.store(target, (sum_d / tl.maximum(weight, 1.0)).to(out.dtype.element_ty), in_head)
        else:
            mine = place * HEADS + head
            tl.store(part_sums + mine * BLOCK_D + d, sum_d)
            tl.store(part_weights + mine * 2, top)
            tl.store(part_weights + mine * 2 + 1, weight)
            tl.debug_barrier()  # all threads' parts are written before this program says that it arrived
            seen = tl.atomic_add(arrived + out_row * HEADS + head, 1, sem="acq_rel")
            if seen == parts - 1:
                tl.store(arrived + out_row * HEADS + head, 0)
                first = (place - part) * HEADS + head
                sum_d, weight = _add_up(part_sums + d, part_weights, first, parts, HEADS, BLOCK_D)
                tl.store(target, (sum_d / weight).to(out.dtype.element_ty), in_head)


@triton.jit
def _tile(
    query,
    keys,
    values,
    slopes,
    tables,
    items,
    out,
    query_stride,
    block_stride,
    token_stride,
    head_stride,
    scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of a sequence's queries, of one head, against all keys that they see."""
    start_next(PDL)
    head = tl.program_id(0)
    item = items + tl.program_id(1) * COLUMNS
    table = tables + tl.load(item)
    query_row = tl.load(item + 1).to(tl.int64)
    out_row = tl.load(item + 2).to(tl.int64)
    count = tl.load(item + 3)
    position = tl.load(item + 4)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    wait_for_inputs(PDL)
    mask_md = (m < count)[:, None] & in_head[None, :]
    q_md = tl.load(query + (query_row + m)[:, None] * query_stride + head * D + d[None, :], mask_md, 0.0)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head).to(tl.float32) * 1.4426950408889634
    base = (head // GROUP).to(tl.int64) * head_stride
    top_m = tl.full([BLOCK_M], _FAR, tl.float32)
    weight_m = tl.zeros([BLOCK_M], tl.float32)
    sum_md = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = position + count
    begin = 0
    if WINDOW:
        begin = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key_n = start + n
        held = key_n < end
        block_n = tl.load(table + key_n // BLOCK_SIZE, held, 0).to(tl.int64)
        at_n = base + block_n * block_stride + (key_n % BLOCK_SIZE) * token_stride
        at_nd = at_n[:, None] + d[None, :]
        mask_nd = held[:, None] & in_head[None, :]
        k_nd = tl.load(keys + at_nd, mask_nd, 0.0)
        v_nd = tl.load(values + at_nd, mask_nd, 0.0)
        distance_mn = key_n[None, :] - (position + m)[:, None]
        if CAPPED:
            score_mn = _capped(tl.dot(q_md, k_nd.T, input_precision=PRECISION) * scale, cap)
            score_mn += slope * distance_mn.to(tl.float32)
        else:
            score_mn = tl.dot(q_md, k_nd.T, input_precision=PRECISION) * scale + slope * distance_mn.to(tl.float32)
        if WINDOW:
            score_mn = tl.where((distance_mn <= 0) & (distance_mn > -WINDOW), score_mn, _FAR)
        else:
            score_mn = tl.where(distance_mn <= 0, score_mn, _FAR)
        new_m = tl.maximum(top_m, tl.max(score_mn, 1))
        decay_m = tl.exp2(top_m - new_m)
        p_mn = tl.exp2(score_mn - new_m[:, None])
        weight_m = weight_m * decay_m + tl.sum(p_mn, 1)
        sum_md = sum_md * decay_m[:, None]
        sum_md = tl.dot(p_mn.to(v_nd.dtype), v_nd, sum_md, input_precision=PRECISION)
        top_m = new_m
    target = out + ((out_row + m)[:, None] * HEADS + head) * D + d[None, :]
    # A weight is at least 1, that of the greatest score, or 0 where there are no keys.
    tl.store(target, (sum_md / tl.maximum(weight_m, 1.0)[:, None]).to(out.dtype.element_ty), mask_md)


def paged_attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    alibi_slopes_n: Tensor | None,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    plan = meta.plan
    assert plan is not None
    heads, d = query_tnd.shape[1:]
    block_size, kv_heads = key_cache.shape[1:3]
    out_tnd = query_tnd.new_empty(meta.num_tokens, heads, d)
    common = dict(
        HEADS=heads,
        GROUP=heads // kv_heads,
        BLOCK_SIZE=block_size,
        D=d,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        HAS_SLOPES=alibi_slopes_n is not None,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        **overlapped(query_tnd),
    )
    slopes = query_tnd if alibi_slopes_n is None else alibi_slopes_n
    shared = (query_tnd, key_cache, value_cache, slopes, meta.block_tables)
    strides = (query_tnd.stride(0), *key_cache.stride()[:3])
    cap = (softcap or 0.0) * _LOG2_E
    wide = key_cache.dtype == torch.float32
    if plan.tiles is not None:
        _tile[(heads, plan.tiles.shape[0])](
            *shared, plan.tiles, out_tnd, *strides, scale * _LOG2_E, cap,
            BLOCK_M=TILE, BLOCK_N=16 if wide and d > 128 else 32, STAGES=1 if wide else 2,
            PRECISION="ieee" if wide else "tf32", COLUMNS=TILE_COLUMNS, num_warps=4, **common,
        )  # fmt: skip
    if plan.splits is not None:
        sums, weights, arrived = _parts(meta, plan.splits, heads, common["BLOCK_D"])
        lanes, stages, warps = _cut(meta.num_tokens)
        _one_query[(heads, plan.splits.shape[0])](
            *shared, plan.splits, out_tnd, sums, weights, arrived, *strides, scale * _LOG2_E, cap,
            BLOCK_N=lanes, STAGES=stages, COLUMNS=SPLIT_COLUMNS, num_warps=warps, **common,
        )  # fmt: skip
    return out_tnd


def _cut(queries: int) -> tuple[int, int, int]:
    """Keys at a time, stages and warps of a program for single queries.

    Small programs fill the device evenly; but one sequence wants its few programs to be quick, and with many the memory
    is busy anyway and larger pieces suit it. Measured: docs/performance.md.
    """
    return (8, 3, 1) if 2 < queries <= 128 else (16, 3, 2)


def _parts(meta: AttentionMeta, splits: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where splits of one query leave their results for each other; one place for all layers, which take turns."""
    made = meta.scratch.get("parts")
    if made is None:
        made = meta.scratch["parts"] = (
            splits.new_empty(len(splits), heads, width, dtype=torch.float32),
            splits.new_empty(len(splits), heads, 2, dtype=torch.float32),
            splits.new_zeros(meta.num_tokens, heads),
        )
    return made
