"""Attention over the paged cache on a CPU."""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.cache_scales import CacheScales, octets, widened
from hasten.ops.cpu import fixed
from hasten.ops.cpu.heads import has_kernel
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
    single = _single_queries(query_tnd, key_cache, meta, scores)
    if single is not None and single.are_all:
        return _attend_single(single, query_tnd, key_cache, value_cache, meta, None, scale, scores, softcap, sinks_n)
    key = "attention" if scores.window is None else f"attention, window {scores.window}"
    key = key if scores.bias_nr is None else f"{key}, biases {scores.bias_nr.data_ptr()}"
    plan: list[tuple[Group, Tensor | None]] | None = meta.scratch.get(key)
    if plan is None:
        plan = meta.scratch[key] = groups_of(meta, key_cache, scores, without_single=single is not None)
    query_tx = query_tnd.flatten(1).float()
    out_tx = None
    if min(meta.kv_lens) == 0:
        out_tx = torch.zeros_like(query_tx)
    elif single is not None or len(plan) > 1 or plan[0][0].rows is not None:
        out_tx = torch.empty_like(query_tx)
    if single is not None:
        assert out_tx is not None
        out_tnd = out_tx.view_as(query_tnd)
        _attend_single(single, query_tnd, key_cache, value_cache, meta, out_tnd, scale, scores, softcap, sinks_n)
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


@dataclass(frozen=True)
class _Single:
    """Sequences of a single query each, whose attention a kernel computes."""

    rows_s: Tensor
    """[s] of the block tables."""
    lengths_s: Tensor
    """[s] keys."""
    numbers_s: Tensor | None
    """[s] of their queries in the batch; None where these are all, in order."""

    @property
    def are_all(self) -> bool:
        """Whether there are no others."""
        return self.numbers_s is None


def _single_queries(query_tnd: Tensor, key_cache: Tensor, meta: AttentionMeta, scores: Scores) -> _Single | None:
    """Those of a batch; None where it has none, or no kernel for them."""
    kernels = native.kernels()
    if (
        kernels is None
        or meta.run is not None
        or not (scores.causal or scores.window is None)
        or query_tnd.dtype != torch.float32
        or 1 not in meta.query_lens
        or not has_kernel(kernels, query_tnd.shape[1], key_cache, None)
    ):
        return None
    if meta.numbers is not None:
        return _Single(*meta.numbers, None)
    found: _Single | None = meta.scratch.get("single")
    if found is None:
        lengths = meta.query_lens
        chosen = [number for number, length in enumerate(lengths) if length == 1]
        numbers = None
        if len(chosen) < len(lengths):
            firsts = [0, *accumulate(lengths)]
            numbers = torch.tensor([firsts[number] for number in chosen])
        rows, keys = ([each[number] for number in chosen] for each in (meta.sequences, meta.kv_lens))
        found = meta.scratch["single"] = _Single(torch.tensor(rows), torch.tensor(keys), numbers)
    return found


def _attend_single(
    single: _Single,
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    out_tnd: Tensor | None,
    scale: float,
    scores: Scores,
    softcap: float | None,
    sinks_n: Tensor | None,
) -> Tensor:
    """Attention of these queries, into their rows of `out_tnd` where that is given."""
    kernels = native.kernels()
    assert kernels is not None
    return kernels.attention.attention(
        query_tnd,
        key_cache,
        value_cache,
        meta.block_tables,
        single.rows_s,
        single.lengths_s,
        out_tnd,
        single.numbers_s,
        scale=scale,
        slopes_n=scores.slopes_n,
        sinks_n=sinks_n,
        bias_nr=scores.bias_nr,
        window=scores.window,
        softcap=softcap,
        keys=sum(meta.kv_lens),
    )


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
