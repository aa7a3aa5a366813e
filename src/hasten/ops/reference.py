"""Every op in plain torch: its definition, and the oracle of the tests. Docstrings stand at `hasten.ops.dispatch`."""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops.block_caches import BlockCaches
from hasten.ops.cache_scales import CacheScales, octets, stored, widened
from hasten.ops.draws import NONE_LEFT, Draws
from hasten.ops.edits import IN_PROMPT, LogitEdits, TokenCounts
from hasten.ops.grouped import GroupedWeight
from hasten.ops.heads import HeadTransform
from hasten.ops.logprobs import TopLogprobs
from hasten.ops.meta import AttentionMeta
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.packed import PackedLinear, QuantizedWeight, Weight
from hasten.ops.partial_sum import PartialSum
from hasten.ops.peers import wrapped
from hasten.ops.rounding import rounded

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Types that hold the bits of others of so many bytes."""
_POLL_S = 1e-4
"""Between two looks at a count that another thread writes."""


def embedding(ids_t: Tensor, weight_vh: Weight, first: int | None) -> Tensor:  # noqa: D103
    if first is None:
        return _rows(ids_t, weight_vh)
    local_t = ids_t - first
    held_t = (local_t >= 0) & (local_t < weight_vh.shape[0])
    rows_th = _rows(local_t.where(held_t, 0), weight_vh)
    return rows_th.masked_fill_(~held_t.unsqueeze(1), 0)


def _rows(ids_t: Tensor, weight_vh: Weight) -> Tensor:
    if isinstance(weight_vh, Tensor):
        return F.embedding(ids_t, weight_vh)
    assert isinstance(weight_vh, QuantizedWeight)  # tables have scales of rows
    return (weight_vh.values[ids_t] * weight_vh.scales[ids_t].unsqueeze(1)).to(weight_vh.dtype)


def norm(  # noqa: D103
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    x_th = x_th if isinstance(x_th, Tensor) else complete(x_th).to(weight_h.dtype)
    if not rms:
        return F.layer_norm(x_th, weight_h.shape, weight_h, bias_h, eps), x_th
    normed_th = _rms_norm(_wide(x_th), weight_h, eps, unit_offset)
    return (normed_th if bias_h is None else normed_th + bias_h).to(x_th.dtype), x_th


def _wide(x: Tensor) -> Tensor:
    """The values in fp32, or in fp64 where they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    weight = _wide(weight) + 1 if unit_offset else weight
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def complete(sum_: PartialSum) -> Tensor:
    """A sum added up, in the widest type of its terms; those of other ranks must be in it already."""
    assert not sum_.over_ranks
    total_th = sum_.product()
    for bias_h in (sum_.bias, sum_.added_bias):
        total_th = total_th if bias_h is None else total_th + bias_h
    if sum_.residual is not None:
        total_th = total_th + (sum_.residual if sum_.residual_indices is None else sum_.residual[sum_.residual_indices])
    return total_th


def embedding_norm(  # noqa: D103
    ids_t: Tensor, table_vh: Weight, weight_h: Tensor, bias_h: Tensor, eps: float
) -> Tensor:
    return F.layer_norm(_rows(ids_t, table_vh), weight_h.shape, weight_h, bias_h, eps)


def pack_linear(weight_oh: Weight, shared: bool) -> PackedLinear:  # noqa: ARG001, D103
    if isinstance(weight_oh, QuantizedWeight):
        return PackedLinear(*weight_oh.shape, plain=weight_oh.values, scales=weight_oh.scales, inputs=weight_oh.inputs)
    if isinstance(weight_oh, GroupedWeight):
        return PackedLinear(*weight_oh.shape, plain=None, grouped=weight_oh)
    return PackedLinear(weight_oh.shape[0], weight_oh.shape[1], plain=weight_oh)


def dequantized(weight: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, [o, h]; one that is not quantized as it is."""
    if weight.grouped is not None:
        return weight.grouped.dequantized(dtype)
    assert weight.plain is not None
    if weight.scales is None:
        return weight.plain
    wide = torch.promote_types(dtype, torch.float32)
    values_oh = weight.plain[:, : weight.in_features]  # behind them are zeros
    return (values_oh.to(wide) * weight.scales.to(wide).unsqueeze(1)).to(dtype)


def linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, activation: str | None
) -> Tensor:
    if weight.inputs is not None:
        x_th = rounded(x_th, weight.inputs).to(x_th.dtype)
    out_to = F.linear(x_th, dequantized(weight, x_th.dtype), bias_o)
    return out_to if activation is None else activated(out_to, activation)


def gated_linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, gate: str, scale_1h: Tensor | None = None
) -> Tensor:
    gate_to, up_to = _wide(linear(x_th, weight, bias_o, None)).chunk(2, dim=-1)
    inner_to = activated(gate_to, gate) * up_to
    if scale_1h is not None:
        inner_to = inner_to * F.linear(_wide(x_th), _wide(scale_1h)).sigmoid()
    return inner_to.to(x_th.dtype)


def activated(x: Tensor, name: str) -> Tensor:
    """An activation by its name, element by element.

    Sources: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016 (silu and all kinds of gelu); So et al., "Primer",
    2021 (relu2).
    """
    return _ACTIVATIONS[name](x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def gated(gate: Tensor, up: Tensor, unit: GatedUnit, activate: Callable[[Tensor, str], Tensor] | None = None) -> Tensor:
    """A gated unit of two halves, element by element; `activate` computes activations, if that is given.

    Sources: Shazeer, "GLU Variants Improve Transformer", 2020; OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025
    (limits and offset).
    """
    if unit.limit is not None:
        gate, up = gate.clamp(max=unit.limit), up.clamp(-unit.limit, unit.limit)
    return (activate or activated)(gate, unit.gate) * (up + unit.offset if unit.offset else up)


def route(  # noqa: D103
    x_th: Tensor, router_eh: Tensor, top_k: int, normalized: bool, *, bias_e: Tensor | None = None
) -> Routing:
    bias_e = None if bias_e is None else _wide(bias_e)
    return chosen(F.linear(_wide(x_th), _wide(router_eh), bias_e), top_k, normalized)


def chosen(logits_te: Tensor, top_k: int, normalized: bool) -> Routing:
    """The experts of tokens by the router's logits."""
    # a stable sort: the first among equals, which topk does not promise
    experts_tk = logits_te.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if normalized:
        weights_tk = logits_te.gather(1, experts_tk).softmax(-1)
    else:
        weights_tk = logits_te.softmax(-1).gather(1, experts_tk)
    return Routing(experts_tk.int(), weights_tk)


def pack_experts(  # noqa: D103
    gate_up_eih: Tensor,
    down_ehi: Tensor,
    first: int,
    gate_up_bias_ei: Tensor | None = None,
    down_bias_eh: Tensor | None = None,
) -> PackedExperts:
    count = gate_up_eih.shape[0]
    return PackedExperts(count, first, gate_up_eih, down_ehi, gate_up_bias=gate_up_bias_ei, down_bias=down_bias_eh)


def experts(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:  # noqa: D103
    assert weights.gate_up is not None
    assert weights.down is not None
    out_th = _wide(torch.zeros_like(x_th))
    for expert in range(weights.count):
        tokens, choices = torch.where(routing.experts_tk == weights.first + expert)
        gate_up_bias, down_bias = (
            None if bias is None else bias[expert] for bias in (weights.gate_up_bias, weights.down_bias)
        )
        gate_ti, up_ti = _wide(F.linear(x_th[tokens], weights.gate_up[expert], gate_up_bias)).chunk(2, dim=-1)
        inner_ti = gated(gate_ti, up_ti, unit).to(x_th.dtype)
        scale_t1 = routing.weights_tk[tokens, choices].unsqueeze(1)
        out_th.index_add_(0, tokens, _wide(F.linear(inner_ti, weights.down[expert], down_bias)) * scale_t1)
    return out_th.to(x_th.dtype)


def add_linear(  # noqa: D103
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    residual_to: Tensor | PartialSum | None,
    rows_t: Tensor | None,
) -> Tensor:
    out_to = linear(x_th, weight, bias_o, None)
    if residual_to is None:
        return out_to
    if isinstance(residual_to, PartialSum):
        residual_to = complete(residual_to).to(out_to.dtype)
    return out_to + (residual_to if rows_t is None else residual_to[rows_t])


def project(  # noqa: D103
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform | None = None,
    *,
    clip: float | None = None,
    scales: CacheScales | None = None,
) -> Tensor:
    qkv_to = clipped(linear(x_th, weight, bias_o, None), clip)
    return store_heads(qkv_to, key_cache, value_cache, slots_t, num_heads, transform, scales=scales)


def clipped(x: Tensor, clip: float | None) -> Tensor:
    """The values limited to between -`clip` and `clip`, in place; as they are if that is None."""
    return x if clip is None else x.clamp_(-clip, clip)


def store_heads(
    qkv_to: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform | None,
    *,
    scales: CacheScales | None = None,
) -> Tensor:
    """The second half of `project`: from the fused projection [t, o] to queries [t, n, d] and the caches."""
    query_tnd, key_tmd, value_tmd = split_heads(qkv_to, num_heads, key_cache)
    if transform is not None:
        queries_t, keys_t = (None, None) if transform.mean_squares_t2 is None else transform.mean_squares_t2.unbind(1)
        query_tnd = _transformed(query_tnd, transform.query_norm_d, transform.query_bias_d, queries_t, transform)
        key_tmd = _transformed(key_tmd, transform.key_norm_d, transform.key_bias_d, keys_t, transform)
    write_cache(key_tmd, value_tmd, key_cache, value_cache, slots_t, scales=scales)
    return query_tnd


def _transformed(
    heads_tnd: Tensor,
    weight_d: Tensor | None,
    bias_d: Tensor | None,
    mean_squares_t: Tensor | None,
    transform: HeadTransform,
) -> Tensor:
    x_tnd = _wide(heads_tnd)
    if weight_d is not None:
        weight_nd = _wide(weight_d).unflatten(0, (-1, x_tnd.shape[2])) + transform.unit_offset
        if not transform.rms:
            x_tnd = x_tnd - x_tnd.mean(-1, keepdim=True)
        squares = x_tnd.square().mean(-1, keepdim=True) if mean_squares_t is None else mean_squares_t.view(-1, 1, 1)
        x_tnd = x_tnd * (squares + transform.eps).rsqrt() * weight_nd
        x_tnd = x_tnd if bias_d is None else x_tnd + bias_d
    if transform.table_pr is not None:
        x_tnd = rotated(x_tnd, transform.table_pr[transform.positions_t], transform.interleaved)
    return x_tnd.to(heads_tnd.dtype)


def rotated(x_tnd: Tensor, turn_tr: Tensor, interleaved: bool) -> Tensor:
    """Heads [t, n, d] with their first r dimensions turned by cosines and sines [t, r]."""
    width = turn_tr.shape[1]
    cos, sin = turn_tr.to(x_tnd.dtype).unsqueeze(1).chunk(2, dim=-1)
    turning = x_tnd[..., :width]
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    both = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((both, x_tnd[..., width:]), dim=-1)


def mean_squares(qkv_to: Tensor, num_heads: int, kv_heads: int, head_size: int, ranks: int) -> Tensor:  # noqa: D103
    sections = qkv_to.split([num_heads * head_size, kv_heads * head_size, kv_heads * head_size], dim=-1)
    return torch.stack([part.float().square().mean(-1) / ranks for part in sections[:2]], dim=1)


def split_heads(qkv_to: Tensor, num_heads: int, key_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [t, n, d], keys and values [t, m, d] of a fused projection, for caches [blocks, block size, m, d]."""
    kv_heads, head_size = key_cache.shape[2:]
    query_tnd, key_tmd, value_tmd = qkv_to.unflatten(-1, (-1, head_size)).split([num_heads, kv_heads, kv_heads], dim=1)
    return query_tnd, key_tmd, value_tmd


def write_cache(  # noqa: D103
    key_tmd: Tensor,
    value_tmd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    *,
    scales: CacheScales | None = None,
) -> None:
    if bool((slots_t < 0).any()):
        kept = (slots_t >= 0).nonzero().squeeze(1)
        key_tmd, value_tmd, slots_t = key_tmd[kept], value_tmd[kept], slots_t[kept]
    if scales is not None:
        key_tmd, value_tmd = (
            stored(new_tmd, inverses_m, key_cache.dtype)
            for new_tmd, inverses_m in zip((key_tmd, value_tmd), scales.inverses_2m, strict=True)
        )
    slots_t = slots_t.long()
    width = key_cache.shape[2] * key_cache.shape[3]
    for new_tmd, cache in ((key_tmd, key_cache), (value_tmd, value_cache)):
        octets(cache).view(-1, width).index_copy_(0, slots_t, octets(new_tmd).reshape(-1, width))


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


def resolve_ids(ids_t: Tensor, chosen_r: Tensor) -> Tensor:  # noqa: D103
    chosen_t = chosen_r[(-1 - ids_t).clamp_(min=0)].clamp(min=0)
    return chosen_t.to(ids_t.dtype).where(ids_t < 0, ids_t)


def _distances(query_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Key position minus query position, [q, k]; the queries are the last tokens of the sequence."""
    keys_k, positions_q = (torch.arange(first, kv_len, device=device) for first in (0, kv_len - query_len))
    return keys_k.unsqueeze(0) - positions_q.unsqueeze(1)


def await_count(count: Tensor, number: int, abort_flag: Tensor) -> None:  # noqa: D103
    while wrapped(number - int(count)) > 0 and not int(abort_flag):
        time.sleep(_POLL_S)


def set_count(count: Tensor, number: int) -> None:  # noqa: D103
    count.fill_(wrapped(number))


def copy_blocks(caches: BlockCaches, sources_n: Tensor, targets_n: Tensor) -> None:  # noqa: D103
    for cache in caches.tensors:
        bits = cache.view(_BITS[cache.itemsize])  # copied as 16-bit floats, NaN loses its bits on a GPU
        bits.index_copy_(0, targets_n, bits.index_select(0, sources_n))


def greedy(logits_rv: Tensor) -> Tensor:  # noqa: D103
    best_r, tokens_r = logits_rv.max(-1)
    return where_finite(tokens_r, best_r)


def where_finite(tokens_r: Tensor, best_r: Tensor) -> Tensor:
    """The tokens as int32, and what stands for none where a row's greatest logit is not finite."""
    return tokens_r.where(best_r.isfinite(), -1).masked_fill(best_r == float("-inf"), NONE_LEFT).int()


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:  # noqa: D103
    return where_finite(places(filtered(logits_rv, draws), draws), logits_rv.amax(-1))


def places(probs_rv: Tensor, draws: Draws) -> Tensor:
    """Where the cumulative distribution of what is left of each row reaches its point, [r]."""
    cumulative_rv = probs_rv.cumsum(-1)
    places_r1 = torch.searchsorted(cumulative_rv, draws.point_r1 * cumulative_rv[:, -1:], right=True)
    return places_r1.squeeze(1).clamp_(max=probs_rv.shape[1] - 1)


def floor(probs_rv: Tensor, top_k_r1: Tensor, top_p_r1: Tensor) -> Tensor:
    """The least probability [r, 1] that top-k, and then top-p among what is left, keep.

    What is as probable as the last of the k is left as well, and counts for top-p.
    """
    sorted_rk = probs_rv.topk(int(top_k_r1.max()), dim=-1).values
    left_rv = probs_rv * (probs_rv >= sorted_rk.gather(1, top_k_r1 - 1))
    kept_rk = sorted_rk.cumsum(-1).sub_(sorted_rk) < top_p_r1 * left_rv.sum(-1, keepdim=True)
    kept_rk &= torch.arange(sorted_rk.shape[1], device=sorted_rk.device) < top_k_r1
    return sorted_rk.gather(1, kept_rk.sum(-1, keepdim=True).clamp_(min=1) - 1)


def probabilities(logits_rv: Tensor, draws: Draws) -> Tensor:
    """What `draw` draws from without filters, in fp64: a tiny temperature would leave no distribution in fp32."""
    return logits_rv.to(torch.float64, copy=True).div_(draws.temperature_r1).softmax(-1)


def filtered(logits_rv: Tensor, draws: Draws) -> Tensor:
    """What `draw` draws from: probabilities before the filters, and 0 for tokens that a filter drops."""
    probs_rv = probabilities(logits_rv, draws)
    if not draws.filters:
        return probs_rv
    probs_rv *= probs_rv >= probs_rv.amax(-1, keepdim=True) * draws.min_p_r1
    vocab = logits_rv.shape[1]
    top_k_r1 = draws.top_k_r1.long().clamp(max=vocab)
    top_k_r1 = top_k_r1.where(top_k_r1 > 0, vocab)
    floor_r1 = floor(probs_rv, top_k_r1, draws.top_p_r1).where((top_k_r1 < vocab) | (draws.top_p_r1 < 1), 0)
    return probs_rv.mul_(probs_rv >= floor_r1)


def edit_logits(  # noqa: D103
    logits_rv: Tensor, edits: LogitEdits, counts: TokenCounts, chosen_r: Tensor, *, in_place: bool = False
) -> Tensor:
    edited_rv = logits_rv
    if not in_place:
        edited_rv = logits_rv.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    rows_k = edits.rows_k.long()
    penalized_k = edits.slots_k >= 0
    if bool(penalized_k.any()):
        _penalize(edited_rv, rows_k[penalized_k], edits.slots_k[penalized_k], edits.penalties_k3[penalized_k], counts)
    if len(edits.bias_ids_b):
        biased_b = rows_k.repeat_interleave(edits.bias_starts.diff())
        edited_rv.index_put_((biased_b, edits.bias_ids_b.long()), edits.biases_b, accumulate=True)
    if len(edits.ban_ids_n):
        lengths_k = edits.ban_starts.diff()
        last_n = chosen_r[edits.chosen_k.long()].repeat_interleave(lengths_k)
        holds_n = (edits.ban_after_n < 0) | (edits.ban_after_n == last_n)
        banned = (rows_k.repeat_interleave(lengths_k)[holds_n], edits.ban_ids_n[holds_n].long())
        edited_rv.index_put_(banned, edited_rv.new_tensor(float("-inf")))
    return edited_rv


def _penalize(edited_rv: Tensor, rows_k: Tensor, slots_k: Tensor, penalties_k3: Tensor, counts: TokenCounts) -> None:
    sizes_k1 = counts.sizes_s[slots_k].unsqueeze(1)
    held_kw = torch.arange(int(sizes_k1.max()), device=rows_k.device) < sizes_k1
    k_n, w_n = held_kw.nonzero(as_tuple=True)  # the entries of all rows, one after the other
    entries = slots_k[k_n], w_n
    logits = rows_k[k_n], counts.ids_sw[entries].long()
    output_n = counts.counts_sw[entries] & (IN_PROMPT - 1)
    repetition_n, presence_n, frequency_n = penalties_k3[k_n].unbind(1)
    x_n = edited_rv[logits]
    x_n = torch.where(x_n > 0, x_n / repetition_n, x_n * repetition_n)
    edited_rv[logits] = x_n - (presence_n + frequency_n * output_n).where(output_n > 0, 0)


def count_tokens(counts: TokenCounts, slots_r: Tensor, tokens_r: Tensor) -> None:  # noqa: D103
    counted_r = (slots_r >= 0) & (tokens_r >= 0)
    slots_k, tokens_k = slots_r[counted_r].long(), tokens_r[counted_r]
    if not len(slots_k):
        return
    sizes_k = counts.sizes_s[slots_k]
    width = int(sizes_k.max()) + 1  # with the entry that a new token gets
    held_kw = torch.arange(width, device=sizes_k.device) < sizes_k.unsqueeze(1)
    found_kw = held_kw & (counts.ids_sw[slots_k, :width] == tokens_k.unsqueeze(1))
    known_k = found_kw.any(1)
    at_k = found_kw.int().argmax(1).where(known_k, sizes_k.long())
    counts.ids_sw[slots_k, at_k] = tokens_k
    counts.counts_sw[slots_k, at_k] = counts.counts_sw[slots_k, at_k].where(known_k, 0) + 1
    counts.sizes_s[slots_k] = sizes_k + ~known_k


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:  # noqa: D103
    vocab = x_rv.shape[1]
    values_rk, ids_rk = x_rv.topk(min(count + 1, vocab), dim=-1)
    # topk takes any among equals, and others for another count
    tied_r = (values_rk[:, 1:] == values_rk[:, :-1]).any(-1)
    if bool(tied_r.any()):
        ids_rk[tied_r] = _keys(x_rv[tied_r]).topk(values_rk.shape[1], dim=-1).indices
    return values_rk[:, :count], ids_rk[:, :count].int()


def _keys(x_rv: Tensor) -> Tensor:
    """Distinct numbers in the order of fp32 ones, and among equals the first one's the greatest: int64."""
    bits_rv = (x_rv.float() + 0.0).view(torch.int32).long()  # -0 + 0 is 0
    images_rv = bits_rv ^ ((bits_rv >> 31) & 0x7FFFFFFF)
    return (images_rv << 32) - torch.arange(x_rv.shape[1], device=x_rv.device)


def top_logprobs(  # noqa: D103
    logits_rv: Tensor,
    tokens_r: Tensor,
    count: int,
    largest: Callable[[Tensor, int], tuple[Tensor, Tensor]] = largest,
) -> TopLogprobs:
    logits_rv = logits_rv.float()
    logprobs_rv = logits_rv.log_softmax(-1)
    tokens_r1 = tokens_r.long().clamp(min=0).unsqueeze(1)
    ranks_r = (logits_rv > logits_rv.gather(1, tokens_r1)).sum(-1, dtype=torch.int32) + 1
    _, ids_rk = largest(logits_rv, count)
    return TopLogprobs(
        logprobs_rv.gather(1, tokens_r1).squeeze(1), ranks_r, logprobs_rv.gather(1, ids_rk.long()), ids_rk
    )


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:  # noqa: D103
    rows_k = (index_r >= 0).nonzero().squeeze(1)
    words_kw = masks_kw[index_r[rows_k].long()]
    bits_kv = (words_kw.unsqueeze(-1) >> torch.arange(32, device=words_kw.device)).bitwise_and_(1).flatten(1)
    own_kv = logits_rv[rows_k].masked_fill_(bits_kv[:, : logits_rv.shape[1]] == 0, float("-inf"))
    return logits_rv.index_copy(0, rows_k, own_kv)
