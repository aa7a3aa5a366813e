"""Attention over the paged cache on a CPU."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops import reference
from hasten.ops.cache_scales import CacheScales, octets, widened
from hasten.ops.cpu import attention_kernels, fixed
from hasten.ops.cpu.query_groups import Group, Scores, groups_of
from hasten.ops.cpu.scratch import SCRATCH
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
    operands = (key_cache, value_cache, meta, scale, Scores(alibi_slopes_n, window, causal, bias_nr))
    if scales is None:
        return _attention(query_tnd, *operands, softcap, sinks_n)
    groups = query_tnd.shape[1] // key_cache.shape[2]
    key_scales_n1, value_scales_n1 = scales.scales_2m.repeat_interleave(groups, dim=1).unsqueeze(2)
    out_tnd = _attention(query_tnd.float() * key_scales_n1, *operands, softcap, sinks_n)
    return out_tnd.mul_(value_scales_n1).to(query_tnd.dtype)


def _attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    scores: Scores,
    softcap: float | None,
    sinks_n: Tensor | None,
) -> Tensor:
    """Attention over what stands in the caches."""
    if meta.output_indices is not None:
        query_tnd = query_tnd[meta.output_indices]
    if query_tnd.shape[0] == 0:
        return torch.empty_like(query_tnd)
    by_kernels = attention_kernels.attention(query_tnd, key_cache, value_cache, meta, scale, scores, softcap, sinks_n)
    if by_kernels is not None:
        return by_kernels
    key = "attention" if scores.window is None else f"attention, window {scores.window}"
    key = key if scores.bias_nr is None else f"{key}, biases {scores.bias_nr.data_ptr()}"
    plan: list[tuple[Group, Tensor | None]] | None = meta.scratch.get(key)
    if plan is None:
        plan = meta.scratch[key] = groups_of(meta, key_cache, scores)
    query_tx = query_tnd.flatten(1).float()
    out_tx = None
    if min(meta.kv_lens) == 0:
        out_tx = torch.zeros_like(query_tx)
    elif len(plan) > 1 or plan[0][0].rows is not None:
        out_tx = torch.empty_like(query_tx)
    for group, kept in plan:
        bias = group.bias(scores) if kept is None else kept
        done = _attend(group, query_tx, key_cache, value_cache, bias, scale, softcap, sinks_n, meta.run)
        if out_tx is None:
            return done.view_as(query_tnd).to(query_tnd.dtype)
        if group.kept is not None:
            assert group.targets is not None
            out_tx.index_copy_(0, group.targets, done.index_select(0, group.kept))
        elif group.rows is not None:
            out_tx.index_copy_(0, group.rows, done)
        else:
            out_tx[group.first : group.first + done.shape[0]] = done
    assert out_tx is not None
    return out_tx.view_as(query_tnd).to(query_tnd.dtype)


def _attend(
    group: Group,
    query_tx: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_n: Tensor | None,
    fixed_run: int | None,
) -> Tensor:
    """Attention of one group: [b * q, n * d], padding included."""
    runs, queries, keys = group.size
    kv_heads, head_size = key_cache.shape[2:]
    if group.rows is None:
        padded = query_tx[group.first : group.first + runs * queries]
    else:
        padded = query_tx.index_select(0, group.rows)
    query_bqnd = padded.view(runs, queries, -1, head_size)
    key_bkmd, value_bkmd = (
        _gather(use, cache, group).view(runs, -1, kv_heads, head_size)[:, :keys]
        for use, cache in (("key", key_cache), ("value", value_cache))
    )
    if fixed_run is not None:
        assert bias is not None, "runs of keys are of causal attention"
        out_bqnd = fixed.attend(query_bqnd, key_bkmd, value_bkmd, bias, scale, softcap, sinks_n, fixed_run)
        return out_bqnd.reshape(runs * queries, -1)
    query_bnqd, key, value = (x.transpose(1, 2) for x in (query_bqnd, key_bkmd, value_bkmd))
    grouped = query_bnqd.shape[1] != kv_heads
    if softcap is not None or sinks_n is not None:
        out = _step_by_step(query_bnqd, key, value, bias, scale, softcap, sinks_n)
        return out.transpose(1, 2).reshape(runs * queries, -1)
    out = F.scaled_dot_product_attention(query_bnqd, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(runs * queries, -1)


def _step_by_step(
    query_bnqd: Tensor,
    key_bmkd: Tensor,
    value_bmkd: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_n: Tensor | None,
) -> Tensor:
    """Attention with capped scores or sinks, [b, n, q, d], which torch's own op does not know."""
    groups = query_bnqd.shape[1] // key_bmkd.shape[1]
    key_bnkd, value_bnkd = (x.repeat_interleave(groups, dim=1) for x in (key_bmkd, value_bmkd))
    scores = query_bnqd @ key_bnkd.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return reference.with_sinks(scores if bias is None else scores + bias, sinks_n) @ value_bnkd


def _gather(use: str, cache: Tensor, group: Group) -> Tensor:
    """The group's keys or values from the cache, [b * k, m * d] in fp32, with zeros for padding."""
    rows = octets(cache).flatten(1)
    found = SCRATCH.take(use, (group.blocks.shape[0], rows.shape[1]), rows.dtype)
    torch.index_select(rows, 0, group.blocks, out=found)
    found = found.view(-1, cache.shape[2] * cache.shape[3]).index_fill_(0, group.blank, 0)
    return widened(found.view(cache.dtype))
