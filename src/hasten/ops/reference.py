"""Every op in plain torch: its definition, and the oracle of the tests. Docstrings stand at `hasten.ops`."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.meta import AttentionMeta
from hasten.ops.packed import PackedLinear


def embedding(ids_t: Tensor, weight_vh: Tensor, first: int | None) -> Tensor:  # noqa: D103
    if first is None:
        return F.embedding(ids_t, weight_vh)
    local_t = ids_t - first
    held_t = (local_t >= 0) & (local_t < weight_vh.shape[0])
    rows_th = F.embedding(local_t.where(held_t, 0), weight_vh)
    return rows_th.masked_fill_(~held_t.unsqueeze(1), 0)


def layer_norm(x_th: Tensor, weight_h: Tensor, bias_h: Tensor, eps: float) -> Tensor:  # noqa: D103
    return F.layer_norm(x_th, weight_h.shape, weight_h, bias_h, eps)


def pack_linear(weight_oh: Tensor, shared: bool) -> PackedLinear:  # noqa: ARG001, D103
    return PackedLinear(weight_oh.shape[0], weight_oh.shape[1], plain=weight_oh)


def linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, activation: str | None, residual_to: Tensor | None
) -> Tensor:
    assert weight.plain is not None
    out_to = F.linear(x_th, weight.plain, bias_o)
    if activation == "gelu_tanh":
        out_to = F.gelu(out_to, approximate="tanh")
    return out_to if residual_to is None else out_to + residual_to


def write_cache(  # noqa: D103
    key_tmd: Tensor, value_tmd: Tensor, key_cache: Tensor, value_cache: Tensor, slots_t: Tensor
) -> None:
    if bool((slots_t < 0).any()):
        kept = (slots_t >= 0).nonzero().squeeze(1)
        key_tmd, value_tmd, slots_t = key_tmd[kept], value_tmd[kept], slots_t[kept]
    width = key_cache.shape[2] * key_cache.shape[3]
    for new_tmd, cache in ((key_tmd, key_cache), (value_tmd, value_cache)):
        cache.view(-1, width).index_copy_(0, slots_t, new_tmd.reshape(-1, width))


def paged_attention(  # noqa: D103
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    alibi_slopes_n: Tensor | None,
) -> Tensor:
    block_size, groups = key_cache.shape[1], query_tnd.shape[1] // key_cache.shape[2]
    out_tnd = torch.empty_like(query_tnd)
    start = 0
    for row, (query_len, kv_len) in enumerate(zip(meta.query_lens, meta.kv_lens, strict=True)):
        blocks = meta.block_tables[row, : -(-kv_len // block_size)].long()
        key_knd = key_cache[blocks].flatten(0, 1)[:kv_len].float().repeat_interleave(groups, dim=1)
        value_knd = value_cache[blocks].flatten(0, 1)[:kv_len].float().repeat_interleave(groups, dim=1)
        query_qnd = query_tnd[start : start + query_len].float()
        scores_nqk = torch.einsum("qnd,knd->nqk", query_qnd, key_knd) * scale
        distance_qk = _distances(query_len, kv_len, query_tnd.device)
        if alibi_slopes_n is not None:
            scores_nqk = scores_nqk + alibi_slopes_n.float().view(-1, 1, 1) * distance_qk
        weights_nqk = scores_nqk.masked_fill(distance_qk > 0, float("-inf")).softmax(-1)
        out_tnd[start : start + query_len] = torch.einsum("nqk,knd->qnd", weights_nqk, value_knd).to(out_tnd.dtype)
        start += query_len
    return out_tnd


def _distances(query_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Key position minus query position, [q, k]; the queries are the last tokens of the sequence."""
    keys_k = torch.arange(kv_len, device=device)
    return keys_k.unsqueeze(0) - keys_k[kv_len - query_len :].unsqueeze(1)


def copy_blocks(caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:  # noqa: D103
    for cache in caches:
        cache.index_copy_(0, targets, cache.index_select(0, sources))
