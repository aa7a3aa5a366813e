"""Attention of single tokens over the paged cache, and what goes into the cache: launches of `code/attention.py`."""

import torch
from torch import Tensor

from hasten.ops.native.launch import Kernel, empty, launch

_HEADS = 16
"""Most query heads that share a key head."""
_attention = {torch.float32: Kernel("attention", "21q2d"), torch.bfloat16: Kernel("half_attention", "21q2d", "bf16")}
_store = {torch.float32: Kernel("store", "13q"), torch.bfloat16: Kernel("half_store", "13q", "bf16")}
CACHES = tuple(_store)
"""Types of caches that the kernels know."""


def fits(heads: int, key_heads: int, head_size: int) -> bool:
    """Whether the kernels have room for heads of this form."""
    return head_size % 16 == 0 and heads // key_heads <= _HEADS


def attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    rows_s: Tensor,
    lengths_s: Tensor,
    out_tnd: Tensor | None,
    numbers_s: Tensor | None,
    *,
    scale: float,
    slopes_n: Tensor | None,
    sinks_n: Tensor | None,
    bias_nr: Tensor | None,
    window: int | None,
    softcap: float | None,
    keys: int,
) -> Tensor:
    """Attention of single queries: [t, n, d].

    The query of sequence s is number `numbers_s[s]` of the queries, or the next; its blocks are `tables[rows_s[s]]`
    [int32], of which `lengths_s[s]` [int64] keys count. `keys`: about how many there are in all.
    """
    heads, (block, key_heads, size) = query_tnd.shape[1], key_cache.shape[1:]
    if out_tnd is None:
        out_tnd = empty(query_tnd.shape[0], heads, size)
    launch(
        _attention[key_cache.dtype],
        4 * keys * heads * size,
        len(rows_s),
        key_heads,
        heads // key_heads,
        size,
        block,
        tables.stride(0),
        window or 0,
        query_tnd,
        query_tnd.stride(0),
        key_cache,
        value_cache,
        tables,
        rows_s,
        lengths_s,
        slopes_n,
        sinks_n,
        out_tnd,
        heads * size,
        numbers_s,
        bias_nr,
        0 if bias_nr is None else bias_nr.shape[1] // 2,
        scale,
        softcap or 0.0,
    )
    return out_tnd


def store_heads(
    qkv_to: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    table_pr: Tensor | None,
    positions_t: Tensor | None,
    *,
    interleaved: bool,
) -> Tensor:
    """Queries [t, n, d] of a fused projection [t, o], which is changed; keys and values go to the caches."""
    key_heads, size = key_cache.shape[2:]
    half = 0 if table_pr is None else table_pr.shape[1] // 2
    launch(
        _store[key_cache.dtype],
        4 * qkv_to.numel(),
        len(qkv_to),
        num_heads,
        key_heads,
        size,
        qkv_to,
        qkv_to.stride(0),
        key_cache,
        value_cache,
        slots_t,
        table_pr,
        positions_t,
        half,
        int(interleaved),
    )
    return qkv_to[:, : num_heads * size].unflatten(1, (num_heads, size))
