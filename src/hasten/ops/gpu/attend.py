"""Attention by matrix units: rows of queries against the keys of one key/value head, for tiles and for groups of heads.

Shapes: m rows, n keys at a time, d head size.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
FAR = tl.constexpr(-1.0e30)
"""Below every score, and finite, so that the difference of two of them is a number."""


@triton.jit
def capped(score, cap):
    """Cap * tanh(score / cap), by the logistic function; a large score leads to cap and not to infinity."""
    return cap * (2 / (1 + tl.exp(-2 * (score / cap))) - 1)


@triton.jit
def shaped(
    score_mn,
    distance_mn,
    slope_m,
    bias,
    cap,
    HAS_SLOPES: tl.constexpr,
    CAPPED: tl.constexpr,
    FARTHEST: tl.constexpr,
):
    """Scaled scores with what a model does to them: capped, or with a bias by the distance from query to key."""
    if CAPPED:
        score_mn = capped(score_mn, cap)
    if HAS_SLOPES:
        # a fused operation, named so that it is the same one in every kernel
        score_mn = tl.fma(slope_m[:, None], distance_mn.to(tl.float32), score_mn)
    if FARTHEST:
        near_mn = tl.minimum(tl.maximum(distance_mn, -FARTHEST), FARTHEST)
        score_mn += tl.load(bias + near_mn + FARTHEST) * 1.4426950408889634
    return score_mn


@triton.jit
def column(x):
    """Numbers of rows [m] as a column [m, 1]; the number of a single row as it is."""
    if len(x.shape) == 1:
        return x[:, None]
    else:
        return x


@triton.jit
def with_sink(sums, weight, top, sink):
    """A softmax that has one more logit, without a value, in the units of `top`: its sums, weights and tops.

    Of one row, with sums [d] and numbers, or of rows, with sums [m, d] and [m].
    """
    new = tl.maximum(top, sink)
    decay = tl.exp2(top - new)
    return sums * column(decay), weight * decay + tl.exp2(sink - new), new


@triton.jit
def blocks(table, start, end, n, BLOCK_SIZE: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """Numbers of the cache blocks of the keys from `start` on that lie before `end`: one, or one per key."""
    if ONE_BLOCK:
        return tl.load(table + start // BLOCK_SIZE, start < end, 0).to(tl.int64)
    else:
        return tl.load(table + (start + n) // BLOCK_SIZE, start + n < end, 0).to(tl.int64)


@triton.jit
def attend(
    q_md,
    keys,
    values,
    table,
    next_n,
    begin,
    end,
    position_m,
    last_m,
    slope_m,
    bias,
    block_stride,
    token_stride,
    scale,
    cap,
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
    CAUSAL: tl.constexpr,
    FARTHEST: tl.constexpr,
    PRECISION: tl.constexpr,
    CONSECUTIVE: tl.constexpr = False,
):
    """Softmax of queries [m, d] over the keys from `begin` to `end`: unscaled sums [m, d], weights [m], tops [m].

    `position_m` are the queries' positions, and `last_m` those of the last keys that they see here. Where FARTHEST is
    not 0, `bias` has what is added for each distance from query to key, up to so far either way. With ONE_BLOCK no
    step of BLOCK_N keys crosses a border between cache blocks, so that a step reads a single block number.
    With AHEAD a step reads the block numbers of the next, and those of the first are `next_n`: Triton loads keys as
    many stages ahead of their use as it is given only where their addresses do not depend on what the same step reads.
    With CONSECUTIVE the blocks follow each other, and `keys` and `values` point to the first of the sequence: there is
    no table.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    top_m = tl.full([BLOCK_M], FAR, tl.float32)
    weight_m = tl.zeros([BLOCK_M], tl.float32)
    sum_md = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lane_nd = (n * token_stride)[:, None] + d[None, :]
    for start in range(begin, end, BLOCK_N):
        key_n = start + n
        held = key_n < end
        if CONSECUTIVE:
            at_nd = start * token_stride + lane_nd
        else:
            if AHEAD:
                block_n = next_n
                next_n = blocks(table, start + BLOCK_N, end, n, BLOCK_SIZE, ONE_BLOCK)
            else:
                block_n = blocks(table, start, end, n, BLOCK_SIZE, ONE_BLOCK)
            if ONE_BLOCK:
                at_nd = block_n * block_stride + (start % BLOCK_SIZE) * token_stride + lane_nd
            else:
                at_n = block_n * block_stride + (key_n % BLOCK_SIZE) * token_stride
                at_nd = at_n[:, None] + d[None, :]
        mask_nd = held[:, None] & in_head[None, :]
        k_nd = tl.load(keys + at_nd, mask_nd, 0.0).to(q_md.dtype)
        v_nd = tl.load(values + at_nd, mask_nd, 0.0).to(q_md.dtype)
        distance_mn = key_n[None, :] - position_m[:, None]
        score_mn = tl.dot(q_md, k_nd.T, input_precision=PRECISION) * scale
        score_mn = shaped(score_mn, distance_mn, slope_m, bias, cap, HAS_SLOPES, CAPPED, FARTHEST)
        seen_mn = key_n[None, :] <= last_m[:, None]
        if WINDOW:
            seen_mn = seen_mn & (distance_mn > -WINDOW)
            if not CAUSAL:
                seen_mn = seen_mn & (distance_mn < WINDOW)
        score_mn = tl.where(seen_mn, score_mn, FAR)
        new_m = tl.maximum(top_m, tl.max(score_mn, 1))
        decay_m = tl.exp2(top_m - new_m)
        p_mn = tl.exp2(score_mn - new_m[:, None])
        weight_m = weight_m * decay_m + tl.sum(p_mn, 1)
        sum_md = sum_md * decay_m[:, None]
        sum_md = tl.dot(p_mn.to(v_nd.dtype), v_nd, sum_md, input_precision=PRECISION)
        top_m = new_m
    return sum_md, weight_m, top_m


@triton.jit
def attend_runs(
    q_md,
    keys,
    values,
    table,
    first_run,
    begin,
    end,
    position_m,
    last_m,
    slope_m,
    bias,
    sink,
    value_scale,
    block_stride,
    token_stride,
    scale,
    cap,
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
    CAUSAL: tl.constexpr,
    FARTHEST: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
):
    """As `attend`, but the softmax of each run of keys is computed by itself and added to that of the runs before.

    Runs begin at multiples of RUN, from `first_run` on, and have no keys before `begin`. Each is multiplied by
    `value_scale`, and the first of a sequence has one more logit, `sink`; both may be None.
    """
    sum_md = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight_m = tl.zeros([BLOCK_M], tl.float32)
    top_m = tl.full([BLOCK_M], FAR, tl.float32)
    for start in range(first_run, end, RUN):
        own_begin, own_end = tl.maximum(start, begin), tl.minimum(start + RUN, end)
        first_n = blocks(table, own_begin, own_end, tl.arange(0, BLOCK_N), BLOCK_SIZE, ONE_BLOCK)
        part_md, part_weight_m, part_top_m = attend(
            q_md, keys, values, table, first_n, own_begin, own_end, position_m, last_m, slope_m, bias, block_stride,
            token_stride, scale, cap, BLOCK_SIZE, D, BLOCK_M, BLOCK_D, BLOCK_N, ONE_BLOCK, AHEAD,
            HAS_SLOPES, WINDOW, CAPPED, CAUSAL, FARTHEST, PRECISION,
        )  # fmt: skip
        if value_scale is not None:
            part_md *= value_scale
        if sink is not None:
            in_run = tl.where(start == 0, sink, FAR)
            part_md, part_weight_m, part_top_m = with_sink(part_md, part_weight_m, part_top_m, in_run)
        sum_md, weight_m, top_m = merged(sum_md, weight_m, top_m, part_md, part_weight_m, part_top_m)
    return sum_md, weight_m, top_m


@triton.jit
def merged(sums, weight, top, their_sums, their_weight, their_top):
    """Two parts of a softmax as one: unscaled sums, weights and tops."""
    new = tl.maximum(top, their_top)
    own, theirs = tl.exp2(top - new), tl.exp2(their_top - new)
    # which of two products is fused with the sum would else be the compiler's choice in each kernel
    weight = tl.fma(weight, own, their_weight * theirs)
    return tl.fma(sums, column(own), their_sums * column(theirs)), weight, new
