"""Attention over the paged cache."""

import torch
from torch import Tensor

from hasten.ops.cache_scales import CacheScales, widened
from hasten.ops.meta import AttentionMeta


def paged_attention(  # noqa: D103
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    alibi_slopes_n: Tensor | None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks_n: Tensor | None = None,
    causal: bool = True,
    bias_nr: Tensor | None = None,
    scales: CacheScales | None = None,
) -> Tensor:
    query_tnd = query_tnd if meta.output_indices is None else query_tnd[meta.output_indices]
    block_size, groups = key_cache.shape[1], query_tnd.shape[1] // key_cache.shape[2]
    out_tnd = torch.empty_like(query_tnd)
    start = 0
    for row, query_len, kv_len in zip(meta.sequences, meta.query_lens, meta.kv_lens, strict=True):
        blocks = meta.block_tables[row, : -(-kv_len // block_size)].long()
        key_knd, value_knd = (
            _held(cache[blocks].flatten(0, 1)[:kv_len], scales, kind).repeat_interleave(groups, dim=1)
            for kind, cache in enumerate((key_cache, value_cache))
        )
        query_qnd = query_tnd[start : start + query_len].float()
        scores_nqk = torch.einsum("qnd,knd->nqk", query_qnd, key_knd) * scale
        if softcap is not None:
            scores_nqk = softcap * torch.tanh(scores_nqk / softcap)
        distance_qk = _distances(query_len, kv_len, query_tnd.device)
        if alibi_slopes_n is not None:
            scores_nqk = scores_nqk + alibi_slopes_n.float().view(-1, 1, 1) * distance_qk
        if bias_nr is not None:
            scores_nqk = scores_nqk + relative_bias(bias_nr, distance_qk)
        unseen_qk = unseen(distance_qk, window, causal)
        weights_nqk = with_sinks(scores_nqk.masked_fill(unseen_qk, float("-inf")), sinks_n)
        out_tnd[start : start + query_len] = torch.einsum("nqk,knd->qnd", weights_nqk, value_knd).to(out_tnd.dtype)
        start += query_len
    return out_tnd


def _held(heads_kmd: Tensor, scales: CacheScales | None, kind: int) -> Tensor:
    """What keys (kind 0) or values (1) of a cache stand for, in fp32."""
    wide_kmd = widened(heads_kmd)
    return wide_kmd if scales is None else wide_kmd * scales.scales_2m[kind].unsqueeze(1)


def with_sinks(scores_nqk: Tensor, sinks_n: Tensor | None) -> Tensor:
    """The softmax over keys of scores [..., n, q, k], of which each head's sink takes a part that is dropped."""
    if sinks_n is None:
        return scores_nqk.softmax(-1)
    sinks_nq1 = sinks_n.to(scores_nqk.dtype).view(-1, 1, 1).expand(*scores_nqk.shape[:-1], 1)
    return torch.cat((scores_nqk, sinks_nq1), dim=-1).softmax(-1)[..., :-1]


def unseen(distance: Tensor, window: int | None, causal: bool) -> Tensor:
    """Whether a query does not see a key at a distance, which is above 0 behind it; of the distances' shape."""
    hidden = distance > 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance <= -window) | (distance >= window)
    return hidden


def relative_bias(bias_nr: Tensor, distance: Tensor) -> Tensor:
    """The bias of each head for each distance from query to key: [n, *distance]."""
    farthest = bias_nr.shape[1] // 2
    return bias_nr[:, distance.long().clamp(-farthest, farthest) + farthest]


def _distances(query_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Key position minus query position, [q, k]; the queries are the last tokens of the sequence."""
    keys_k, positions_q = (torch.arange(first, kv_len, device=device) for first in (0, kv_len - query_len))
    return keys_k.unsqueeze(0) - positions_q.unsqueeze(1)
