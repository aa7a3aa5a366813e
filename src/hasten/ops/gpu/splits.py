"""Attention of single queries: programs for a split of one sequence's keys, whose results the last one adds up.

Where every query head has keys of its own, a program is for one head and computes without matrix units: what it reads
is read by no other. Where a group of heads has the same keys, a program is for the group, whose heads are the rows of
a matrix product, so that keys are read once and not once per head. That is quicker for the heads of a single query
too, each a group of its own, since its programs are few.

BESIDE the kernel for tiles of the same step, which lets the next one start once its own inputs are there, programs wait
for that one at their end: it writes other rows, and whoever waits for these kernels waits for both.
"""

import triton
import triton.language as tl

from hasten.ops.gpu.attend import FAR, attend, attend_runs, blocks, capped, column, merged, with_sink
from hasten.ops.gpu.launch import start_next, wait_for_inputs

_FEW_ROWS = tl.constexpr(16)


@triton.jit
def _wait(program, parts, PDL: tl.constexpr):
    """Wait for earlier kernels: one program is enough, and those without work leave their room at once."""
    if (parts > 0) | (program == 0):
        wait_for_inputs(PDL)


@triton.jit
def _part(part_sums, part_weights, part, there, BLOCK_D: tl.constexpr):
    """What another program wrote as a part of a softmax; nothing where it is not `there`."""
    top = tl.load(part_weights + part * 2, there, FAR, cache_modifier=".cg")
    weight = tl.load(part_weights + part * 2 + 1, there, 0.0, cache_modifier=".cg")
    sums = tl.load(part_sums + column(part) * BLOCK_D, column(there), 0.0, cache_modifier=".cg")
    return sums, weight, top


@triton.jit
def _add_up(part_sums, part_weights, first, parts, STEP: tl.constexpr, BLOCK_D: tl.constexpr):
    """The parts of one softmax, STEP places from each other, that other programs wrote: their sum and weight.

    `first` is the place of the first part: a number for sum [d], or [m] for sums [m, d] of rows and weights [m]. Of few
    rows four parts are on their way at once, and added in their order; one that is not there changes no bit.
    """
    top = tl.full(first.shape, FAR, tl.float32)
    weight = tl.full(first.shape, 0.0, tl.float32)
    sums = tl.zeros((part_sums + column(first)).shape, tl.float32)
    at_once: tl.constexpr = 4 if first.numel <= _FEW_ROWS else 1
    for number in range(0, parts, at_once):
        part, there = first + number * STEP, first >= 0
        sums_0, weight_0, top_0 = _part(part_sums, part_weights, part, there, BLOCK_D)
        if at_once > 1:
            there &= number + 1 < parts
            sums_1, weight_1, top_1 = _part(part_sums, part_weights, part + STEP, there, BLOCK_D)
            there &= number + 2 < parts
            sums_2, weight_2, top_2 = _part(part_sums, part_weights, part + 2 * STEP, there, BLOCK_D)
            there &= number + 3 < parts
            sums_3, weight_3, top_3 = _part(part_sums, part_weights, part + 3 * STEP, there, BLOCK_D)
        sums, weight, top = merged(sums, weight, top, sums_0, weight_0, top_0)
        if at_once > 1:
            sums, weight, top = merged(sums, weight, top, sums_1, weight_1, top_1)
            sums, weight, top = merged(sums, weight, top, sums_2, weight_2, top_2)
            sums, weight, top = merged(sums, weight, top, sums_3, weight_3, top_3)
    return sums, weight


@triton.jit
def one_query(
    query,
    keys,
    values,
    slopes,
    sinks,
    scales,
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
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    FARTHEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BESIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query of one head against a split of the keys of that head; `scales`: those of caches of 8 bits.

    The query is the last token of its sequence, or has no position. Each of BLOCK_N lanes of keys keeps its own running
    softmax, so that nothing crosses lanes before the end. The program that finishes last among the splits of a query
    adds them up. Where FARTHEST is not 0, `slopes` are biases by distance instead, 2 * FARTHEST + 1 of each head.
    """
    start_next(PDL)
    head = tl.program_id(0)
    program = tl.program_id(1)
    item = items + program * COLUMNS
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
    if scales is not None:
        scale *= tl.load(scales + head)
    base = head.to(tl.int64) * head_stride
    if not BESIDE:
        _wait(program, parts, PDL)
    if parts > 0:
        q_d = tl.load(query + query_row * query_stride + head * D + d, in_head, 0.0).to(tl.float32) * scale
        top_n = tl.full([BLOCK_N], FAR, tl.float32)
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
                score_n = capped(score_n, cap)
            score_n += slope * (start + n - (length - 1)).to(tl.float32)
            if FARTHEST:
                near_n = tl.minimum(tl.maximum(start + n - (length - 1), -FARTHEST), FARTHEST)
                score_n += tl.load(slopes + head * (2 * FARTHEST + 1) + FARTHEST + near_n) * 1.4426950408889634
            if WINDOW:
                held = held & (start + n >= length - WINDOW)
            score_n = tl.where(held, score_n, FAR)
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
        if scales is not None:
            sum_d *= tl.load(scales + HEADS + head)
        if sinks is not None:
            # of all splits of a query, the first one has the sink
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            sum_d, weight, top = with_sink(sum_d, weight, top, tl.where(part == 0, sink, FAR))
        target = out + (out_row * HEADS + head) * D + d
        if parts == 1:
            # A weight is at least 1, that of the greatest score, or 0 where there are no keys.
            tl.store(target, (sum_d / tl.maximum(weight, 1.0)).to(out.dtype.element_ty), in_head)
        else:
            mine = program * HEADS + head
            tl.store(part_sums + mine * BLOCK_D + d, sum_d)
            tl.store(part_weights + mine * 2, top)
            tl.store(part_weights + mine * 2 + 1, weight)
            tl.debug_barrier()  # all threads' parts are written before this program says that it arrived
            seen = tl.atomic_add(arrived + out_row * HEADS + head, 1, sem="acq_rel")
            if seen == parts - 1:
                tl.store(arrived + out_row * HEADS + head, 0)
                first = (program - part) * HEADS + head
                sum_d, weight = _add_up(part_sums + d, part_weights, first, parts, HEADS, BLOCK_D)
                tl.store(target, (sum_d / weight).to(out.dtype.element_ty), in_head)
    if BESIDE:
        _wait(program, parts, PDL)


@triton.jit
def query_group(
    query,
    keys,
    values,
    slopes,
    sinks,
    scales,
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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    FARTHEST: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BESIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query of BLOCK_M heads of a group, or of those that it has, against a split of the keys.

    With RUN, a split is one run of that many keys, or all of the sequence's.
    """
    start_next(PDL)
    pieces = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // pieces
    first_row = tl.program_id(0) % pieces * BLOCK_M
    row_m = first_row + tl.arange(0, BLOCK_M)
    in_group = row_m < GROUP
    # Rows behind a group's end repeat its last head, so that every load has somewhere to read from.
    head_m = kv_head * GROUP + tl.minimum(row_m, GROUP - 1)
    program = tl.program_id(1)
    item = items + program * COLUMNS
    table = tables + tl.load(item)
    query_row = tl.load(item + 1).to(tl.int64)
    out_row = tl.load(item + 2).to(tl.int64)
    begin = tl.load(item + 3)
    end = tl.load(item + 4)
    length = tl.load(item + 5)
    part = tl.load(item + 6)
    parts = tl.load(item + 7)
    d = tl.arange(0, BLOCK_D)
    mask_md = in_group[:, None] & (d < D)[None, :]
    slope_m = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SLOPES:
        slope_m = tl.load(slopes + head_m).to(tl.float32) * 1.4426950408889634
    if scales is not None:
        scale *= tl.load(scales + kv_head)
    base = kv_head.to(tl.int64) * head_stride
    if WINDOW:
        begin = tl.maximum(begin, tl.minimum(end, tl.maximum(length - WINDOW, 0) // BLOCK_N * BLOCK_N))
    first_n = blocks(table, begin, end, tl.arange(0, BLOCK_N), BLOCK_SIZE, ONE_BLOCK)
    if not BESIDE:
        _wait(program, parts, PDL)
    if parts > 0:
        q_md = tl.load(query + query_row * query_stride + head_m[:, None] * D + d[None, :], mask_md, 0.0)
        position_m = tl.zeros([BLOCK_M], tl.int32) + (length - 1)
        last_m = tl.zeros([BLOCK_M], tl.int32) + (end - 1)
        biases = slopes + (head_m * (2 * FARTHEST + 1))[:, None]
        if RUN:
            first_run = begin // RUN * RUN
            sink_m, value_scale = None, None
            if sinks is not None:
                sink_m = tl.load(sinks + head_m).to(tl.float32) * 1.4426950408889634
                first_run = tl.load(item + 3)  # the first run has the sink, even if the window begins behind its keys
            if scales is not None:
                value_scale = tl.load(scales + HEADS // GROUP + kv_head)
            sum_md, weight_m, top_m = attend_runs(
                q_md, keys + base, values + base, table, first_run, begin, end, position_m, last_m, slope_m, biases,
                sink_m, value_scale, block_stride, token_stride, scale, cap, BLOCK_SIZE, D, BLOCK_M, BLOCK_D, BLOCK_N,
                ONE_BLOCK, AHEAD, HAS_SLOPES, WINDOW, CAPPED, True, FARTHEST, PRECISION, RUN,
            )  # fmt: skip
        else:
            sum_md, weight_m, top_m = attend(
                q_md, keys + base, values + base, table, first_n, begin, end, position_m, last_m, slope_m, biases,
                block_stride, token_stride, scale, cap, BLOCK_SIZE, D, BLOCK_M, BLOCK_D, BLOCK_N, ONE_BLOCK, AHEAD,
                HAS_SLOPES, WINDOW, CAPPED, True, FARTHEST, PRECISION,
            )  # fmt: skip
            if scales is not None:
                sum_md *= tl.load(scales + HEADS // GROUP + kv_head)
            if sinks is not None:
                sink_m = tl.load(sinks + head_m).to(tl.float32) * 1.4426950408889634
                sum_md, weight_m, top_m = with_sink(sum_md, weight_m, top_m, tl.where(part == 0, sink_m, FAR))
        target = out + (out_row * HEADS + head_m)[:, None] * D + d[None, :]
        if parts == 1:
            # A weight is at least 1, that of the greatest score, or 0 where there are no keys.
            tl.store(target, (sum_md / tl.maximum(weight_m, 1.0)[:, None]).to(out.dtype.element_ty), mask_md)
        else:
            mine_m = program * HEADS + head_m
            tl.store(part_sums + mine_m[:, None] * BLOCK_D + d[None, :], sum_md, in_group[:, None])
            tl.store(part_weights + mine_m * 2, top_m, in_group)
            tl.store(part_weights + mine_m * 2 + 1, weight_m, in_group)
            tl.debug_barrier()  # all threads' parts are written before this program says that it arrived
            counter = arrived + out_row * HEADS + kv_head * GROUP + first_row
            seen = tl.atomic_add(counter, 1, sem="acq_rel")
            if seen == parts - 1:
                tl.store(counter, 0)
                first_m = (program - part) * HEADS + head_m
                sum_md, weight_m = _add_up(part_sums + d[None, :], part_weights, first_m, parts, HEADS, BLOCK_D)
                tl.store(target, (sum_md / weight_m[:, None]).to(out.dtype.element_ty), mask_md)
    if BESIDE:
        _wait(program, parts, PDL)
