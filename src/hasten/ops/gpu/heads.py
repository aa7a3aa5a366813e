"""Heads of a fused QKV projection on their way to attention: normed, rotated, and the keys and values stored.

Shapes: t tokens, n query heads, m key/value heads, d head size, r dimensions that turn. In kernels h are the heads of a
program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.cache_scales import CacheScales
from hasten.ops.gpu.eight_bits import in_cache
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.heads import HeadTransform


@triton.jit
def _of_heads(query, key, head_h, d, in_head, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, OWN: tl.constexpr):
    """A weight or bias of norms [h or 1, d], in fp32: queries have one, keys another; with OWN each head its own."""
    is_query = (head_h < HEADS)[:, None] & in_head[None, :]
    is_key = ((head_h >= HEADS) & (head_h < HEADS + KV_HEADS))[:, None] & in_head[None, :]
    of_query = tl.load(query + (OWN * head_h)[:, None] + d[None, :], is_query, 0.0).to(tl.float32)
    of_key = tl.load(key + (OWN * (head_h - HEADS))[:, None] + d[None, :], is_key, 0.0).to(tl.float32)
    return of_query + of_key


@triton.jit
def _gains(
    norms,
    biases,
    head_h,
    d,
    in_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    OWN: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """What norms multiply dimensions d of heads by, and what they add."""
    gain_hd = _of_heads(norms[0], norms[1], head_h, d, in_head, HEADS, KV_HEADS, OWN)
    if OFFSET:
        gain_hd += 1.0
    shift_hd = tl.zeros([1, 1], tl.float32)
    if SHIFT:
        shift_hd = _of_heads(biases[0], biases[1], head_h, d, in_head, HEADS, KV_HEADS, 0)
    return gain_hd, shift_hd


@triton.jit
def _normed(x_hd, mean_h, scale_h, gain_hd, shift_hd, RMS: tl.constexpr, SHIFT: tl.constexpr):
    """Dimensions of heads whose means and scales are known."""
    if not RMS:
        x_hd = x_hd - mean_h[:, None]
    y_hd = x_hd * scale_h[:, None] * gain_hd
    if SHIFT:
        y_hd += shift_hd
    return y_hd


@triton.jit(do_not_specialize=["row_stride"])
def _store_heads(
    qkv,
    out,
    keys,
    values,
    slots,
    inverses,
    positions,
    table,
    query_norm,
    key_norm,
    query_bias,
    key_bias,
    mean_squares,
    row_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    OWN: tl.constexpr,
    RMS: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some heads of one token: queries go to `out`, keys and values to the token's slot of their caches."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    head_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    norms = (query_norm, key_norm)
    biases = (query_bias, key_bias)
    slot = tl.load(slots + row).to(tl.int64)
    if NORM:
        gain_hd, shift_hd = _gains(norms, biases, head_h, d, in_head, HEADS, KV_HEADS, OWN, OFFSET, SHIFT)
    if R:
        half: tl.constexpr = R // 2
        if PAIRS:
            is_first = d % 2 == 0
            pair = d // 2
            partner = tl.where(d < R, d ^ 1, d)
        else:
            is_first = d < half
            pair = tl.where(is_first, d, d - half)
            partner = tl.where(is_first, d + half, tl.where(d < R, d - half, d))
        turn = table + tl.load(positions + row).to(tl.int64) * R + pair
        cos = tl.load(turn, d < R, 1.0)
        sin = tl.load(turn + half, d < R, 0.0)
        if NORM:
            other_hd, other_shift_hd = _gains(
                norms, biases, head_h, partner, in_head, HEADS, KV_HEADS, OWN, OFFSET, SHIFT
            )
    wait_for_inputs(PDL)
    start_h = qkv + row * row_stride + head_h * D
    mask_hd = (head_h < HEADS + 2 * KV_HEADS)[:, None] & in_head[None, :]
    stored_hd = tl.load(start_h[:, None] + d[None, :], mask_hd, 0.0)
    x_hd = stored_hd.to(tl.float32)
    mean_h = tl.zeros([BLOCK_H], tl.float32)
    scale_h = tl.full([BLOCK_H], 1.0, tl.float32)
    if R:
        y_hd = tl.load(start_h[:, None] + partner[None, :], mask_hd, 0.0).to(tl.float32)
    if NORM:
        centred_hd = x_hd
        if not RMS:
            mean_h = tl.sum(x_hd, 1) / D
            centred_hd = tl.where(in_head[None, :], x_hd - mean_h[:, None], 0.0)
        if WHOLE:
            squares_h = tl.load(mean_squares + 2 * row + (head_h >= HEADS).to(tl.int32))
        else:
            squares_h = tl.sum(centred_hd * centred_hd, 1) / D
        scale_h = tl.rsqrt(squares_h + eps)
        x_hd = _normed(x_hd, mean_h, scale_h, gain_hd, shift_hd, RMS, SHIFT)
        if R:
            y_hd = _normed(y_hd, mean_h, scale_h, other_hd, other_shift_hd, RMS, SHIFT)
    if R:
        x_hd = x_hd * cos[None, :] + tl.where(is_first[None, :], -y_hd, y_hd) * sin[None, :]
    key_h = head_h - HEADS
    value_h = key_h - KV_HEADS
    tl.store(
        out + ((row * HEADS + head_h) * D)[:, None] + d[None, :],
        x_hd.to(out.dtype.element_ty),
        (head_h < HEADS)[:, None] & in_head[None, :],
    )
    if inverses is not None:
        inverse_h1 = tl.load(inverses + key_h, (key_h >= 0) & (key_h < 2 * KV_HEADS), 0.0)[:, None]
        x_hd = in_cache(x_hd.to(out.dtype.element_ty), inverse_h1, keys.dtype.element_ty)
        stored_hd = in_cache(stored_hd, inverse_h1, values.dtype.element_ty)
    tl.store(
        keys + ((slot * KV_HEADS + key_h) * D)[:, None] + d[None, :],
        x_hd.to(keys.dtype.element_ty),
        ((slot >= 0) & (key_h >= 0) & (value_h < 0))[:, None] & in_head[None, :],
    )
    tl.store(
        values + ((slot * KV_HEADS + value_h) * D)[:, None] + d[None, :],
        stored_hd,
        ((slot >= 0) & (value_h >= 0))[:, None] & mask_hd,
    )


def _heads_per_program(rows: int, heads: int, block: int) -> int:
    """Larger programs are fewer to start, but few rows want all multiprocessors. Measured: docs/performance-log.md."""
    dimensions = next((most for limit, most in _DIMENSIONS if rows <= limit), _MOST_DIMENSIONS)
    return min(max(1, dimensions // block), triton.next_power_of_2(heads))


_DIMENSIONS = [(128, 512), (1024, 1024)]
"""Maximum number of rows, and dimensions of all heads of a program up to it."""
_MOST_DIMENSIONS = 2048


def store_heads(
    qkv_to: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform,
    *,
    scales: CacheScales | None = None,
    fixed_order: bool = False,
) -> Tensor:
    """See `hasten.ops.reference.store_heads`; with `fixed_order` norms of heads do not depend on the number of rows."""
    kv_heads, head_size = key_cache.shape[2:]
    assert qkv_to.stride(1) == 1
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    rows = qkv_to.shape[0]
    out_tnd = qkv_to.new_empty(rows, num_heads, head_size)

    def given(tensor: Tensor | None) -> Tensor:
        return qkv_to if tensor is None else tensor

    table, weight_d = transform.table_pr, transform.query_norm_d
    block, heads = triton.next_power_of_2(head_size), num_heads + 2 * kv_heads
    together = _heads_per_program(1 if fixed_order and weight_d is not None else rows, heads, block)
    _store_heads[(rows, triton.cdiv(heads, together))](
        qkv_to,
        out_tnd,
        key_cache,
        value_cache,
        slots_t,
        None if scales is None else scales.inverses_2m,
        transform.positions_t,
        given(table),
        given(weight_d),
        given(transform.key_norm_d),
        given(transform.query_bias_d),
        given(transform.key_bias_d),
        given(transform.mean_squares_t2),
        qkv_to.stride(0),
        transform.eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        D=head_size,
        BLOCK_H=together,
        BLOCK_D=block,
        R=0 if table is None else table.shape[1],
        PAIRS=transform.interleaved,
        NORM=weight_d is not None,
        OWN=head_size if weight_d is not None and weight_d.shape[0] > head_size else 0,
        RMS=transform.rms,
        OFFSET=transform.unit_offset,
        SHIFT=transform.query_bias_d is not None,
        WHOLE=transform.mean_squares_t2 is not None,
        num_warps=max(1, min(4, together * block // 64)),
        **overlapped(qkv_to),
    )
    return out_tnd


@triton.jit(do_not_specialize=["row_stride"])
def _mean_squares(
    qkv,
    out,
    row_stride,
    factor,
    Q: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The mean square of one token's queries (program 0 of two) or keys."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1)
    width = tl.where(keys == 0, Q, K)
    start = qkv + row * row_stride + keys * Q
    at = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for offset in tl.static_range(0, Q, BLOCK):
        x = tl.load(start + offset + at, offset + at < width, 0.0).to(tl.float32)
        total += x * x
    tl.store(out + 2 * row + keys, tl.sum(total, 0) / width * factor)


_SQUARES_BLOCK = 1024


def mean_squares(qkv_to: Tensor, num_heads: int, kv_heads: int, head_size: int, ranks: int) -> Tensor:
    """See `hasten.ops.mean_squares`."""
    assert qkv_to.stride(1) == 1
    rows, queries = qkv_to.shape[0], num_heads * head_size
    out_t2 = torch.empty(rows, 2, dtype=torch.float32, device=qkv_to.device)
    block = min(_SQUARES_BLOCK, triton.next_power_of_2(queries))
    _mean_squares[(rows, 2)](
        qkv_to,
        out_t2,
        qkv_to.stride(0),
        1 / ranks,
        Q=queries,
        K=kv_heads * head_size,
        BLOCK=block,
        num_warps=4,
        **overlapped(qkv_to),
    )
    return out_t2
