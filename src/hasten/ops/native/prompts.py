"""Attention of the queries of prompts over the paged cache: launches of `code/prompts.py`."""

import torch
from torch import Tensor

from hasten.ops.native.launch import Kernel, empty, launch

_HEAD_SIZE = 512
"""Largest head for which the kernel has room."""
_prompts = {torch.float32: Kernel("prompts", "23q2d"), torch.bfloat16: Kernel("half_prompts", "23q2d", "bf16")}


def fits(head_size: int) -> bool:
    """Whether the kernel has room for heads that `native.attention.fits` takes."""
    return head_size <= _HEAD_SIZE


def attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    rows_s: Tensor,
    lengths_s: Tensor,
    firsts_s: Tensor,
    counts_s: Tensor,
    out_tnd: Tensor | None,
    *,
    scale: float,
    slopes_n: Tensor | None,
    sinks_n: Tensor | None,
    bias_nr: Tensor | None,
    window: int | None,
    softcap: float | None,
    causal: bool,
    scores: int,
) -> Tensor:
    """Attention of the queries of sequences: [t, n, d], into `out_tnd` where that is given.

    Sequence s has `counts_s[s]` queries from number `firsts_s[s]` on, the last tokens of its `lengths_s[s]` keys, all
    [int64]; its blocks are `tables[rows_s[s]]` [int32]. `scores`: about how many there are of each head.
    """
    heads, (block, key_heads, size) = query_tnd.shape[1], key_cache.shape[1:]
    if out_tnd is None:
        out_tnd = empty(query_tnd.shape[0], heads, size)
    launch(
        _prompts[key_cache.dtype],
        2 * scores * heads * size,
        len(rows_s),
        key_heads,
        heads // key_heads,
        size,
        block,
        tables.stride(0),
        window or 0,
        int(causal),
        query_tnd,
        query_tnd.stride(0),
        key_cache,
        value_cache,
        tables,
        rows_s,
        lengths_s,
        firsts_s,
        counts_s,
        slopes_n,
        sinks_n,
        out_tnd,
        heads * size,
        bias_nr,
        0 if bias_nr is None else bias_nr.shape[1] // 2,
        scale,
        softcap or 0.0,
    )
    return out_tnd
