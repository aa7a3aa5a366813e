"""Kernels of products with weights of full precision, whose time is that of reading them: launched by `matmul.py`.

Shapes: M rows, N output features, K input features; weights [N, K], row by row.
"""

import triton
import triton.language as tl

from hasten.ops.gpu.activations import activated
from hasten.ops.gpu.endings import paired, store_projected, store_turned, turns_of
from hasten.ops.gpu.launch import prefetch, start_next, wait_for_inputs


@triton.jit(do_not_specialize=["N"])
def matvec(
    x,
    weight,
    bias,
    out,
    keys,
    values,
    slots,
    inverses,
    positions,
    table,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLIP: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: each program multiplies it with ROWS rows of the weight."""
    start_next(PDL)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = n < N
    pair = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    if PAIRS is not None:
        n = tl.where(valid, paired(n, N, PAIRS, D, R), 0)
    k = tl.arange(0, BLOCK_K)
    start = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    ragged: tl.constexpr = K % BLOCK_K != 0
    first = tl.load(start, valid[:, None] & (k < K)[None, :], 0.0)
    if HAS_BIAS:
        bias_n = tl.load(bias + n, valid, 0.0).to(tl.float32)
    if KV:
        slot = tl.load(slots).to(tl.int64)
        if PAIRS is not None:
            cos, sin, turn = turns_of(table, tl.load(positions).to(tl.int64), pair, 2 * pair < N, Q, KV, D, R)
    wait_for_inputs(PDL)
    total = first.to(tl.float32) * tl.load(x + k, k < K, 0.0).to(tl.float32)[None, :]
    for offset in tl.static_range(BLOCK_K, K, BLOCK_K):
        if ragged:
            more = tl.load(start + offset, valid[:, None] & (k + offset < K)[None, :], 0.0)
            part = tl.load(x + offset + k, k + offset < K, 0.0)
        else:
            more = tl.load(start + offset, valid[:, None], 0.0)
            part = tl.load(x + offset + k)
        total += more.to(tl.float32) * part.to(tl.float32)[None, :]
    value = tl.sum(total, 1)
    if HAS_BIAS:
        value += bias_n
    if ACTIVATION is not None and PAIRS != "gate":
        value = activated(value, ACTIVATION)
    if CLIP is not None:
        value = tl.clamp(value, -CLIP, CLIP, propagate_nan=tl.PropagateNan.ALL)
    value = value.to(out.dtype.element_ty)
    if PAIRS is not None:
        even, odd = tl.split(value.reshape([ROWS // 2, 2]))
        if KV:
            targets = pair * 0, slot, 2 * pair < N
            store_turned(even, odd, (cos, sin, turn), pair, targets, out, keys, values, inverses, N, Q, KV, PAIRS, D, R)
        else:
            unit = activated(even.to(tl.float32), ACTIVATION) * odd.to(tl.float32)
            tl.store(out + pair, unit.to(out.dtype.element_ty), 2 * pair < N)
    elif KV:
        store_projected(value, n * 0, slot, n, valid, out, keys, values, inverses, Q, KV, D)
    else:
        tl.store(out + n, value, valid)


@triton.jit
def _tile_of(block, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tiles of rows and of features of a program, of GROUP tiles of rows by all features at a time."""
    tiles = tl.cdiv(M, BLOCK_M)
    programs = GROUP * tl.cdiv(N, BLOCK_N)
    first = block // programs * GROUP
    count = tl.minimum(tiles - first, GROUP)
    return first + block % programs % count, block % programs // count


@triton.jit
def _dots(
    x_start,
    w_start,
    total,
    in_rows,
    k,
    LENGTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` and the products over LENGTH input features, in their order."""
    for offset in tl.range(0, LENGTH, BLOCK_K, num_stages=STAGES):
        if LENGTH % BLOCK_K == 0:
            w_nk = tl.load(w_start + offset)
            x_mk = tl.load(x_start + offset, in_rows[:, None], 0.0)
        else:
            inside = (k + offset < LENGTH)[None, :]
            w_nk = tl.load(w_start + offset, inside, 0.0)
            x_mk = tl.load(x_start + offset, in_rows[:, None] & inside, 0.0)
        total = tl.dot(w_nk, x_mk.T, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["M"])
def skinny(
    x,
    weight,
    bias,
    out,
    keys,
    values,
    slots,
    inverses,
    positions,
    table,
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUNDED: tl.constexpr,
    CLIP: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Up to BLOCK_M rows on the tensor cores; the weight is the wide operand, so that few rows waste little.

    With GROUP, any number of rows: programs of so many tiles of rows lie next to each other. With SPLITS above 1, each
    split of K writes its own fp32 sums [SPLITS, M, N]; whoever reads them adds them up. With SEGMENTS above 1, a
    program adds up those of so many splits itself: [1, M, N].
    With ROUNDED, the activation is that of what would be stored without it.
    """
    start_next(PDL)
    block = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    if GROUP > 0:
        tile, block = _tile_of(block, M, N, BLOCK_M, BLOCK_N, GROUP)
        m += tile * BLOCK_M
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_features = n < N
    if PAIRS is not None:
        n = paired(n, N, PAIRS, D, R)
    begin = tl.program_id(1) * (K // SPLITS)
    k = begin + tl.arange(0, BLOCK_K)
    row = tl.where(in_features, n, 0).to(tl.int64)
    w_start = weight + row[:, None] * K + k[None, :]
    if PDL and AHEAD:
        line = begin + tl.arange(0, AHEAD) * (1024 // weight.dtype.element_ty.primitive_bitwidth)
        prefetch(weight + row[:, None] * K + line[None, :])
    wait_for_inputs(PDL)
    if PAIRS is not None:
        pair = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        stored = (2 * pair < N)[:, None] & (m < M)[None, :]
        if KV:
            position = tl.load(positions + m, m < M, 0).to(tl.int64)
            cos, sin, turn = turns_of(table, position[None, :], pair[:, None], stored, Q, KV, D, R)
    x_start = x + m[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    length: tl.constexpr = K // (SPLITS * SEGMENTS)
    total = _dots(x_start, w_start, total, m < M, k, length, BLOCK_K, STAGES, PRECISION)
    for segment in tl.range(1, SEGMENTS, num_stages=1):
        part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        at = segment * length
        total += _dots(x_start + at, w_start + at, part, m < M, k, length, BLOCK_K, STAGES, PRECISION)
    if SPLITS > 1 or SEGMENTS > 1:
        base = out + tl.program_id(1).to(tl.int64) * M * N
        tl.store(base + m[None, :] * N + n[:, None], total, (m < M)[None, :] & in_features[:, None])
    else:
        if HAS_BIAS:
            bias_n = tl.load(bias + n, in_features, 0.0).to(tl.float32)
            # a plain sum would be the product's first one where K is a single block, in another order than elsewhere
            total = tl.fma(bias_n[:, None], tl.full([1, 1], 1.0, tl.float32), total)
        if ROUNDED:
            total = total.to(out.dtype.element_ty).to(tl.float32)
        if ACTIVATION is not None and PAIRS != "gate":
            total = activated(total, ACTIVATION)
        if CLIP is not None:
            total = tl.clamp(total, -CLIP, CLIP, propagate_nan=tl.PropagateNan.ALL)
        value = total.to(out.dtype.element_ty)
        valid = (m < M)[None, :] & in_features[:, None]
        if PAIRS is not None:
            even, odd = tl.split(value.reshape([BLOCK_N // 2, 2, BLOCK_M]).permute(0, 2, 1))
            if KV:
                targets = m[None, :], tl.load(slots + m, m < M, -1).to(tl.int64)[None, :], stored
                turns = cos, sin, turn
                store_turned(
                    even, odd, turns, pair[:, None], targets, out, keys, values, inverses, N, Q, KV, PAIRS, D, R
                )
            else:
                unit = activated(even.to(tl.float32), ACTIVATION) * odd.to(tl.float32)
                target = out + m[None, :].to(tl.int64) * (N // 2) + pair[:, None]
                tl.store(target, unit.to(out.dtype.element_ty), stored)
        elif KV:
            slot = tl.load(slots + m, m < M, -1).to(tl.int64)
            store_projected(value, m[None, :], slot[None, :], n[:, None], valid, out, keys, values, inverses, Q, KV, D)
        else:
            tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], value, valid)


@triton.jit(do_not_specialize=["count"])
def activate(x, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The activation of each number, in place."""
    start_next(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    value = activated(tl.load(x + at, at < count, 0.0).to(tl.float32), ACTIVATION)
    tl.store(x + at, value.to(x.dtype.element_ty), at < count)
