"""Heads of a fused QKV projection on their way to attention: normed, rotated, and the keys and values stored.

Shapes: t tokens, n query heads, m key/value heads, d head size, r dimensions that turn. One program a token and head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.heads import HeadTransform


@triton.jit
def _normed(x, mean, scale, norm, norm_bias, d, mask, RMS: tl.constexpr, OFFSET: tl.constexpr, SHIFT: tl.constexpr):
    """Dimensions d of a head whose mean and scale are known."""
    gain = tl.load(norm + d, mask, 0.0).to(tl.float32)
    if OFFSET:
        gain += 1.0
    if not RMS:
        x = x - mean
    y = x * scale * gain
    if SHIFT:
        y += tl.load(norm_bias + d, mask, 0.0).to(tl.float32)
    return y


@triton.jit
def _change(
    start,
    norm,
    norm_bias,
    mean_square,
    table,
    position,
    d,
    in_head,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A query or key head after its norm and rotation, in fp32."""
    x = tl.load(start + d, in_head, 0.0).to(tl.float32)
    mean = 0.0
    scale = 1.0
    if NORM:
        centred = x
        if not RMS:
            mean = tl.sum(x, 0) / D
            centred = tl.where(in_head, x - mean, 0.0)
        squares = tl.load(mean_square) if WHOLE else tl.sum(centred * centred, 0) / D
        scale = tl.rsqrt(squares + eps)
        x = _normed(x, mean, scale, norm, norm_bias, d, in_head, RMS, OFFSET, SHIFT)
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
        y = tl.load(start + partner, in_head, 0.0).to(tl.float32)
        if NORM:
            y = _normed(y, mean, scale, norm, norm_bias, partner, in_head, RMS, OFFSET, SHIFT)
        turn = table + position * R + pair
        cos = tl.load(turn, d < R, 1.0)
        sin = tl.load(turn + half, d < R, 0.0)
        x = x * cos + tl.where(is_first, -y, y) * sin
    return x


@triton.jit(do_not_specialize=["row_stride"])
def _store_heads(
    qkv,
    out,
    keys,
    values,
    slots,
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
    """One head of one token: a query goes to `out`, a key or value to the token's slot of its cache."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    wait_for_inputs(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    start = qkv + row * row_stride + head * D
    if head < HEADS:
        changed = _change(
            start, query_norm + OWN * head, query_bias, mean_squares + 2 * row, table, position, d, in_head, eps,
            D, R, PAIRS, NORM, RMS, OFFSET, SHIFT, WHOLE,
        )  # fmt: skip
        tl.store(out + (row * HEADS + head) * D + d, changed.to(out.dtype.element_ty), in_head)
    elif slot >= 0:
        if head < HEADS + KV_HEADS:
            changed = _change(
                start, key_norm + OWN * (head - HEADS), key_bias, mean_squares + 2 * row + 1, table, position, d,
                in_head, eps, D, R, PAIRS, NORM, RMS, OFFSET, SHIFT, WHOLE,
            )  # fmt: skip
            tl.store(keys + (slot * KV_HEADS + head - HEADS) * D + d, changed.to(keys.dtype.element_ty), in_head)
        else:
            value = tl.load(start + d, in_head, 0.0)
            tl.store(values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * D + d, value, in_head)


def store_heads(
    qkv_to: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform,
) -> Tensor:
    """See `hasten.ops.reference.store_heads`."""
    kv_heads, head_size = key_cache.shape[2:]
    assert qkv_to.stride(1) == 1
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    rows = qkv_to.shape[0]
    out_tnd = qkv_to.new_empty(rows, num_heads, head_size)

    def given(tensor: Tensor | None) -> Tensor:
        return qkv_to if tensor is None else tensor

    table, weight_d = transform.table_pr, transform.query_norm_d
    block = triton.next_power_of_2(head_size)
    _store_heads[(rows, num_heads + 2 * kv_heads)](
        qkv_to,
        out_tnd,
        key_cache,
        value_cache,
        slots_t,
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
        BLOCK_D=block,
        R=0 if table is None else table.shape[1],
        PAIRS=transform.interleaved,
        NORM=weight_d is not None,
        OWN=head_size if weight_d is not None and weight_d.shape[0] > head_size else 0,
        RMS=transform.rms,
        OFFSET=transform.unit_offset,
        SHIFT=transform.query_bias_d is not None,
        WHOLE=transform.mean_squares_t2 is not None,
        num_warps=max(1, min(4, block // 64)),
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
