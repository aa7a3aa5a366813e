"""Heads of a fused QKV projection on their way to attention: normed, rotated, and the keys and values stored.

Shapes: t tokens, n query heads, m key/value heads, d head size, r dimensions that turn. One program a token and head.
"""

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.heads import HeadTransform


@triton.jit
def _gain(norm, d, mask, OFFSET: tl.constexpr):
    gain = tl.load(norm + d, mask, 0.0).to(tl.float32)
    if OFFSET:
        gain += 1.0
    return gain


@triton.jit
def _change(
    start,
    norm,
    table,
    position,
    d,
    in_head,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """A query or key head after its norm and rotation, in fp32."""
    x = tl.load(start + d, in_head, 0.0).to(tl.float32)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x = x * scale * _gain(norm, d, in_head, OFFSET)
    if R:
        half: tl.constexpr = R // 2
        partner = tl.where(d < half, d + half, tl.where(d < R, d - half, d))
        y = tl.load(start + partner, in_head, 0.0).to(tl.float32)
        if NORM:
            y = y * scale * _gain(norm, partner, in_head, OFFSET)
        turn = table + position * R + tl.where(d < half, d, d - half)
        cos = tl.load(turn, d < R, 1.0)
        sin = tl.load(turn + half, d < R, 0.0)
        x = x * cos + tl.where(d < half, -y, y) * sin
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
    row_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
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
        changed = _change(start, query_norm, table, position, d, in_head, eps, D, R, NORM, OFFSET)
        tl.store(out + (row * HEADS + head) * D + d, changed.to(out.dtype.element_ty), in_head)
    elif slot >= 0:
        if head < HEADS + KV_HEADS:
            changed = _change(start, key_norm, table, position, d, in_head, eps, D, R, NORM, OFFSET)
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
    table, normed = transform.table_pr, transform.query_norm_d is not None
    block = triton.next_power_of_2(head_size)
    _store_heads[(rows, num_heads + 2 * kv_heads)](
        qkv_to,
        out_tnd,
        key_cache,
        value_cache,
        slots_t,
        transform.positions_t,
        qkv_to if table is None else table,
        qkv_to if transform.query_norm_d is None else transform.query_norm_d,
        qkv_to if transform.key_norm_d is None else transform.key_norm_d,
        qkv_to.stride(0),
        transform.eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        D=head_size,
        BLOCK_D=block,
        R=0 if table is None else table.shape[1],
        NORM=normed,
        OFFSET=transform.unit_offset,
        num_warps=max(1, min(4, block // 64)),
        **overlapped(qkv_to),
    )
    return out_tnd
