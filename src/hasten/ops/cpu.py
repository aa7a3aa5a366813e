"""Fast paths of the CPU, with the signatures of `reference.py`; docstrings stand at `hasten.ops`.

Weights in bf16 stay so where the processor multiplies them (`cpu_bf16.py`). Other half-precision weights are widened to
fp32 when they are packed: without instructions for them a CPU takes 20 times as long over a half-precision product
(docs/performance.md), and the products are then summed in fp32 as well. So are weights in fp8, of which a CPU has no
products at all; weights in int8 stay so.
"""

import math
import threading
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops import cpu_bf16, cpu_fixed, cpu_grouped, cpu_int8, native, reference
from hasten.ops.cache_scales import CacheScales, octets, widened
from hasten.ops.compiled_rows import compiled_rows
from hasten.ops.grouped import GroupedWeight
from hasten.ops.heads import HeadTransform
from hasten.ops.meta import AttentionMeta
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.order import order_is_fixed
from hasten.ops.packed import FUSED, PACK_FOR_ROWS, PackedLinear, QuantizedWeight, Weight
from hasten.ops.partial_sum import PartialSum
from hasten.ops.rounding import rounded

_SMALL_WEIGHT = 1 << 20
"""Weights of fewer elements keep a plain layout too: oneDNN takes longer to start than to multiply a few rows."""
_FEW_ROWS = 1
_QUERY_CHUNK = 256
"""Most queries of one sequence in one attention call: bounds the bias and skips keys that lie ahead."""
_CACHED_ELEMENTS = 1 << 19
"""Elements of keys that one attention call gathers, if more than one run: what is gathered must still be in the
processor's cache when it is read, or decoding waits for memory twice."""
_KEPT_BIAS = 1 << 25
"""Elements of attention bias that a step keeps for all layers; with more, each layer makes its own."""


class _Scratch(threading.local):
    """Memory that an op needs for a moment, kept for its next call on this thread.

    The system would take large pieces back each time and give them out again page by page, at times for longer than
    the op itself takes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with whatever content; the next `take` for the same use gives the same memory."""
        size = math.prod(shape)
        kept = self._kept.get((use, dtype))
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # a tensor made inside could not be written outside
                kept = self._kept[use, dtype] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)


_scratch = _Scratch()


def pack_linear(weight_oh: Weight, shared: bool) -> PackedLinear:  # noqa: D103
    if isinstance(weight_oh, QuantizedWeight):
        if weight_oh.values.dtype == torch.int8:
            return cpu_int8.pack_linear(weight_oh)
        wide_oh = weight_oh.values.float().mul_(weight_oh.scales.unsqueeze(1))
        return replace(pack_linear(wide_oh, False), inputs=weight_oh.inputs)
    if isinstance(weight_oh, GroupedWeight):
        return cpu_grouped.pack_linear(weight_oh)
    if weight_oh.dtype == torch.bfloat16 and cpu_bf16.is_supported() and not order_is_fixed():
        return cpu_bf16.pack_linear(weight_oh)
    as_it_is = shared and weight_oh.dtype == torch.float32
    weight_oh = weight_oh.float().contiguous()
    out_features, in_features = weight_oh.shape
    kernels = None if order_is_fixed() else native.kernels()
    if kernels is not None and not (as_it_is and weight_oh.numel() >= _SMALL_WEIGHT):
        return PackedLinear(out_features, in_features, plain=None, panels=kernels.products.pack(weight_oh))
    if as_it_is or not torch.backends.mkldnn.is_available():
        return PackedLinear(out_features, in_features, plain=weight_oh, fixed_order=order_is_fixed())
    plain = None
    if weight_oh.numel() < _SMALL_WEIGHT and not order_is_fixed():
        # The longer axis innermost: one row is then multiplied in up to half the time.
        plain = weight_oh if in_features > out_features else weight_oh.t().contiguous().t()
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight_oh, PACK_FOR_ROWS)
    return PackedLinear(out_features, in_features, plain=plain, blocked=blocked, fixed_order=order_is_fixed())


def embedding(ids_t: Tensor, weight_vh: Weight, first: int | None) -> Tensor:  # noqa: D103
    kernels = native.kernels()
    if kernels is None or first is not None or not _is_plain(weight_vh) or ids_t.dtype != torch.int64:
        return reference.embedding(ids_t, weight_vh, first)
    assert isinstance(weight_vh, Tensor)
    return kernels.norms.gather(ids_t, weight_vh)


def norm(  # noqa: D103
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    kernels = native.kernels()
    x_th = x_th if isinstance(x_th, Tensor) else reference.complete(x_th).to(weight_h.dtype)
    if kernels is None or not _is_plain(x_th, weight_h):
        return reference.norm(x_th, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset)
    return kernels.norms.norm(x_th, weight_h, bias_h, eps, None, rms=rms, offset=unit_offset), x_th


def embedding_norm(  # noqa: D103
    ids_t: Tensor, table_vh: Weight, weight_h: Tensor, bias_h: Tensor, eps: float
) -> Tensor:
    kernels = native.kernels()
    if kernels is None or not _is_plain(table_vh, weight_h) or ids_t.dtype != torch.int64:
        return reference.embedding_norm(ids_t, table_vh, weight_h, bias_h, eps)
    assert isinstance(table_vh, Tensor)
    return kernels.norms.norm(table_vh, weight_h, bias_h, eps, ids_t, rms=False, offset=False)


def _is_plain(*operands: Weight) -> bool:
    """Whether all are tensors in fp32 of at most two axes, row after row."""
    return all(
        isinstance(each, Tensor) and each.dtype == torch.float32 and each.is_contiguous() and each.dim() <= 2
        for each in operands
    )


def linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, activation: str | None
) -> Tensor:
    return _linear(x_th, weight, bias_o, activation, None)


def add_linear(  # noqa: D103
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    residual_to: Tensor | PartialSum | None,
    rows_t: Tensor | None,
) -> Tensor:
    if isinstance(residual_to, PartialSum):
        residual_to = reference.complete(residual_to).to(x_th.dtype)
    return _linear(x_th, weight, bias_o, None, residual_to, rows_t)


def gated_linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, gate: str, scale_1h: Tensor | None = None
) -> Tensor:
    wide_th = x_th.float()
    kernels = None if weight.panels is None or scale_1h is not None else native.kernels()
    if kernels is not None and gate in kernels.products.ACTIVATIONS and weight.out_features % 32 == 0:
        both_to = _linear(wide_th, weight, bias_o, None, None)
        return kernels.products.gated(both_to, gate).to(x_th.dtype)
    gate_to, up_to = _linear(wide_th, weight, bias_o, None, None).chunk(2, dim=-1)
    if weight.fixed_order:
        inner_to = cpu_fixed.activated(gate_to, gate).mul_(up_to)
        if scale_1h is not None:
            inner_to.mul_(cpu_fixed.sigmoid((wide_th * scale_1h.float()).sum(-1, keepdim=True)))
        return inner_to.to(x_th.dtype)
    inner_to = reference.activated(gate_to, gate).mul_(up_to)
    if scale_1h is not None:
        inner_to.mul_(F.linear(wide_th, scale_1h.float()).sigmoid_())
    return inner_to.to(x_th.dtype)


def route(  # noqa: D103
    x_th: Tensor, router_eh: Tensor, top_k: int, normalized: bool, bias_e: Tensor | None, fixed: bool
) -> Routing:
    if not fixed:
        return reference.route(x_th, router_eh, top_k, normalized, bias_e=bias_e)
    count, width = router_eh.shape
    weight = PackedLinear(count, width, plain=router_eh.float().contiguous(), fixed_order=True)
    logits_te = cpu_fixed.product(x_th.float(), weight)
    return reference.chosen(logits_te if bias_e is None else logits_te.add_(bias_e), top_k, normalized)


def pack_experts(  # noqa: D103
    gate_up_eih: Tensor,
    down_ehi: Tensor,
    first: int,
    gate_up_bias_ei: Tensor | None = None,
    down_bias_eh: Tensor | None = None,
) -> PackedExperts:
    pairs = zip(gate_up_eih, down_ehi, strict=True)
    linears = tuple((pack_linear(gate_up_ih, False), pack_linear(down_hi, False)) for gate_up_ih, down_hi in pairs)
    biases = gate_up_bias_ei, down_bias_eh
    return PackedExperts(len(linears), first, None, None, linears, *biases, fixed_order=order_is_fixed())


def experts(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:
    """Tokens sorted by expert, then one product of each kind for every expert that has any."""
    top_k = routing.experts_tk.shape[1]
    order_p = routing.experts_tk.flatten().sort(stable=True).indices
    counts = torch.bincount(routing.experts_tk.flatten(), minlength=weights.first + weights.count).tolist()
    tokens_p = order_p // top_k
    scales_p1 = routing.weights_tk.flatten()[order_p].unsqueeze(1)
    out_th = torch.zeros(x_th.shape, dtype=torch.float32)
    start = sum(counts[: weights.first])
    for expert, (gate_up, down) in enumerate(weights.linears):
        count = counts[weights.first + expert]
        rows, start = slice(start, start + count), start + count
        if count == 0:
            continue
        gate_up_bias, down_bias = (
            None if bias is None else bias[expert] for bias in (weights.gate_up_bias, weights.down_bias)
        )
        gate_ti, up_ti = linear(x_th[tokens_p[rows]].float(), gate_up, gate_up_bias, None).chunk(2, dim=-1)
        inner_ti = reference.gated(gate_ti, up_ti, unit, cpu_fixed.activated if weights.fixed_order else None)
        out_th.index_add_(0, tokens_p[rows], linear(inner_ti, down, down_bias, None).mul_(scales_p1[rows]))
    return out_th.to(x_th.dtype)


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
    qkv_to = reference.clipped(linear(x_th, weight, bias_o, None), clip)
    return store_heads(qkv_to, key_cache, value_cache, slots_t, num_heads, transform, scales=scales)


def store_heads(  # noqa: D103
    qkv_to: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform | None,
    *,
    scales: CacheScales | None = None,
) -> Tensor:
    kernels = native.kernels()
    if (
        kernels is None
        or not _is_plain(qkv_to)
        or not _has_kernel(kernels, num_heads, key_cache, scales)
        or (transform is not None and not transform.only_turns)
        or slots_t.dtype != torch.int64
    ):
        return reference.store_heads(qkv_to, key_cache, value_cache, slots_t, num_heads, transform, scales=scales)
    table, positions, interleaved = None, None, False
    if transform is not None:
        table, positions, interleaved = transform.table_pr, transform.positions_t.long(), transform.interleaved
    caches = (key_cache, value_cache)
    return kernels.attention.store_heads(qkv_to, *caches, slots_t, num_heads, table, positions, interleaved=interleaved)


def _has_kernel(kernels: native.Kernels, heads: int, key_cache: Tensor, scales: CacheScales | None) -> bool:
    """Whether the kernels of attention work on heads and caches of this form."""
    key_heads, size = key_cache.shape[2:]
    return scales is None and key_cache.dtype == torch.float32 and kernels.attention.fits(heads, key_heads, size)


def _linear(
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    residual_to: Tensor | None,
    rows_t: Tensor | None = None,
) -> Tensor:
    dtype = x_th.dtype
    if x_th.shape[0] == 0:
        return x_th.new_empty(0, weight.out_features)
    if weight.panels is not None:
        return _panels(x_th, weight, bias_o, activation, residual_to, rows_t)
    if residual_to is not None and rows_t is not None:
        residual_to = residual_to[rows_t]
    if cpu_bf16.is_packed(weight):
        return cpu_bf16.product(x_th, weight, bias_o, activation, residual_to)
    x_th = x_th.float()
    bias_o = None if bias_o is None else bias_o.float()
    if weight.scales is None and weight.inputs is not None:
        x_th = rounded(x_th, weight.inputs)
    if weight.scales is not None:
        out_to = cpu_int8.product(x_th, weight, weight.scales)
        out_to = out_to if bias_o is None else out_to.add_(bias_o)
    elif weight.grouped is not None or weight.blocked_groups is not None:
        out_to = cpu_grouped.product(x_th, weight)
        out_to = out_to if bias_o is None else out_to.add_(bias_o)
    elif weight.fixed_order:
        out_to = cpu_fixed.product(x_th, weight)
        out_to = out_to if bias_o is None else out_to.add_(bias_o)
    elif weight.blocked is None or (weight.plain is not None and x_th.shape[0] <= _FEW_ROWS):
        assert weight.plain is not None
        out_to = F.linear(x_th, weight.plain, bias_o)
    elif activation in FUSED and _fuses():
        out_to, activation = _blocked(x_th, weight.blocked, bias_o, *FUSED[activation]), None
    else:
        out_to = _blocked(x_th, weight.blocked, bias_o, "none", "")
    if activation is not None:
        out_to = _activated(out_to, activation, weight.fixed_order)
    if residual_to is not None:
        out_to = out_to.add_(residual_to)
    return out_to.to(dtype)


def _panels(
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    residual_to: Tensor | None,
    rows_t: Tensor | None,
) -> Tensor:
    """A product with a weight in the panels of the kernels."""
    kernels = native.kernels()
    assert kernels is not None, "who packed it had them"
    assert weight.panels is not None
    products, dtype, x_th = kernels.products, x_th.dtype, x_th.float()
    if weight.inputs is not None:
        x_th = rounded(x_th, weight.inputs)
    x_th = x_th if x_th.stride(-1) == 1 else x_th.contiguous()
    bias_o, residual_to = (None if each is None else each.float().contiguous() for each in (bias_o, residual_to))
    operands = (x_th, weight.panels, weight.out_features, bias_o)
    if activation is None or activation in products.ACTIVATIONS:
        return products.product(*operands, activation, residual_to, rows_t).to(dtype)
    assert residual_to is None, "no product has both"
    return _activated(products.product(*operands, None, None, None), activation, fixed=False).to(dtype)


@cache
def _fuses() -> bool:
    """Whether oneDNN's activations are faster than passes of our own: with AVX-512, not with AVX2."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _blocked(x_th: Tensor, weight: Tensor, bias_o: Tensor | None, activation: str, variant: str) -> Tensor:
    """A product with a weight in oneDNN's layout, and an activation by oneDNN's name."""
    rows = x_th.shape[0]
    more = compiled_rows(rows) - rows
    padded_th = F.pad(x_th, (0, 0, 0, more)) if more else x_th
    return torch.ops.mkldnn._linear_pointwise(padded_th, weight, bias_o, activation, [], variant)[:rows]


def _activated(x: Tensor, name: str, fixed: bool) -> Tensor:
    if fixed:
        return cpu_fixed.activated(x, name)
    return _gelu_tanh(x) if name == "gelu_tanh" else reference.activated(x, name)


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form, written with the logistic function, which a CPU computes faster than tanh."""
    gate = torch.mul(x, x, out=_scratch.take("gelu", tuple(x.shape)))
    torch.addcmul(x, gate, x, value=0.044715, out=gate)
    return x.mul_(gate.mul_(1.5957691216057308).sigmoid_())


@dataclass(frozen=True)
class _Group:
    """Runs of queries that one padded attention call handles: b runs, q queries, k keys (whole blocks)."""

    rows: Tensor | None
    """[b * q] row of the flat batch for each padded query; None where the runs stand in the batch just so."""
    first: int
    """First row in the batch, where `rows` is None."""
    places: Tensor | None
    """[real queries] place in the padded output of each real query; None where no query is padding."""
    targets: Tensor | None
    """[real queries] row of the flat batch of each real query."""
    blocks: Tensor
    """[b * k / block size, rounded up] cache blocks."""
    positions: Tensor
    """[b] position of each run's first query, from the first key of its blocks on."""
    ends: Tensor
    """[b] keys of each run: all that any of its queries sees, and those before their window in the same block."""
    blank: Tensor
    """[padding] keys of the b * k that are of no sequence, or not written yet: whatever stands there must not count."""
    size: tuple[int, int, int]
    """b, q, k; of keys in whole blocks only where attention is causal, which makes nothing of those behind the last."""

    def bias(self, scores: "_Scores") -> Tensor | None:
        """What is added to the scores, [b, n or 1, q, k], and -inf for unseen keys; None where that is nothing."""
        _, queries, keys = self.size
        if scores.are_plain and bool((self.ends == keys).all()):
            return None
        positions_bq = self.positions.unsqueeze(1) + torch.arange(queries)
        keys_k = torch.arange(keys)
        distance_bqk = keys_k - positions_bq.unsqueeze(2)
        unseen_bqk = reference.unseen(distance_bqk, scores.window, scores.causal)
        if not scores.causal:
            unseen_bqk |= (keys_k >= self.ends.unsqueeze(1)).unsqueeze(1)
        distance = distance_bqk.unsqueeze(1)
        bias = torch.zeros(distance.shape) if scores.slopes_n is None else distance * scores.slopes_n.view(-1, 1, 1)
        if scores.bias_nr is not None:
            bias = bias + reference.relative_bias(scores.bias_nr, distance_bqk).transpose(0, 1)
        return bias.masked_fill_(unseen_bqk.unsqueeze(1), float("-inf"))


@dataclass(frozen=True)
class _Scores:
    """What decides which keys queries see, and what is added to their scores."""

    slopes_n: Tensor | None
    window: int | None
    causal: bool
    bias_nr: Tensor | None

    @property
    def are_plain(self) -> bool:
        """Whether every query sees every key of its sequence, and nothing is added."""
        return not self.causal and self.slopes_n is None and self.window is None and self.bias_nr is None

    @property
    def heads(self) -> int:
        """Heads that have biases of their own; 1 where all have the same."""
        own = self.slopes_n if self.bias_nr is None else self.bias_nr
        return 1 if own is None else own.shape[0]


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
    operands = (key_cache, value_cache, meta, scale, _Scores(alibi_slopes_n, window, causal, bias_nr))
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
    scores: _Scores,
    softcap: float | None,
    sinks_n: Tensor | None,
) -> Tensor:
    """Attention over what stands in the caches."""
    if meta.output_indices is not None:
        query_tnd = query_tnd[meta.output_indices]
    if query_tnd.shape[0] == 0:
        return torch.empty_like(query_tnd)
    kernels = native.kernels()
    if (
        kernels is not None
        and meta.run is None
        and scores.bias_nr is None
        and (scores.causal or scores.window is None)
        and query_tnd.dtype == torch.float32
        and all(count == 1 for count in meta.query_lens)
        and _has_kernel(kernels, query_tnd.shape[1], key_cache, None)
    ):
        return _single(kernels, query_tnd, key_cache, value_cache, meta, scale, scores, softcap, sinks_n)
    key = "attention" if scores.window is None else f"attention, window {scores.window}"
    key = key if scores.bias_nr is None else f"{key}, biases {scores.bias_nr.data_ptr()}"
    plan: list[tuple[_Group, Tensor | None]] | None = meta.scratch.get(key)
    if plan is None:
        plan = meta.scratch[key] = _plan(meta, key_cache, scores)
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
        if group.places is not None:
            assert group.targets is not None
            out_tx.index_copy_(0, group.targets, done.index_select(0, group.places))
        elif group.rows is not None:
            out_tx.index_copy_(0, group.rows, done)
        else:
            out_tx[group.first : group.first + done.shape[0]] = done
    assert out_tx is not None
    return out_tx.view_as(query_tnd).to(query_tnd.dtype)


def _single(
    kernels: native.Kernels,
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    scores: _Scores,
    softcap: float | None,
    sinks_n: Tensor | None,
) -> Tensor:
    """Attention of a query of each sequence."""
    numbers: tuple[Tensor, Tensor] | None = meta.numbers or meta.scratch.get("numbers")
    if numbers is None:
        numbers = meta.scratch["numbers"] = torch.tensor(meta.sequences), torch.tensor(meta.kv_lens)
    rows_s, lengths_s = numbers
    return kernels.attention.attention(
        query_tnd,
        key_cache,
        value_cache,
        meta.block_tables,
        rows_s,
        lengths_s,
        None,
        None,
        scale=scale,
        slopes_n=scores.slopes_n,
        sinks_n=sinks_n,
        window=scores.window,
        softcap=softcap,
        keys=sum(meta.kv_lens),
    )


def _attend(
    group: _Group,
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
        out_bqnd = cpu_fixed.attend(query_bqnd, key_bkmd, value_bkmd, bias, scale, softcap, sinks_n, fixed_run)
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


def _gather(use: str, cache: Tensor, group: _Group) -> Tensor:
    """The group's keys or values from the cache, [b * k, m * d] in fp32, with zeros for padding."""
    rows = octets(cache).flatten(1)
    found = _scratch.take(use, (group.blocks.shape[0], rows.shape[1]), rows.dtype)
    torch.index_select(rows, 0, group.blocks, out=found)
    found = found.view(-1, cache.shape[2] * cache.shape[3]).index_fill_(0, group.blank, 0)
    return widened(found.view(cache.dtype))


@dataclass(frozen=True)
class _Run:
    """Consecutive queries of one sequence."""

    sequence: int
    first: int
    count: int
    skipped: int
    """Cache blocks that lie before the window of its first query."""
    position: int
    """Of its first query, from the first key that is not skipped on."""
    end: int
    """Keys that its last query sees, and those before its window, as far as their block is not skipped."""


def _plan(meta: AttentionMeta, key_cache: Tensor, scores: _Scores) -> list[tuple[_Group, Tensor | None]]:
    """Divide a batch into padded groups, once a step; with each group its bias, if all of them may be kept.

    All layers with the same window and biases use it again: they have as many heads and the same slopes.
    """
    most_keys = _CACHED_ELEMENTS // (key_cache.shape[2] * key_cache.shape[3])
    block_size = key_cache.shape[1]
    cut = _Cut.of(meta.run, block_size, causal=scores.causal)
    runs = _runs(meta, block_size, scores, cut)
    groups = [_group(meta, pack, block_size, cut) for pack in _pack(runs, most_keys)]
    keep = sum(math.prod(group.size) for group in groups) * scores.heads <= _KEPT_BIAS
    return [(group, group.bias(scores) if keep else None) for group in groups]


@dataclass(frozen=True)
class _Cut:
    """How the queries of a sequence, and the keys that they see, are cut."""

    queries: int = _QUERY_CHUNK
    """Most queries of a run."""
    blocks: int = 1
    """Cache blocks of keys come in multiples of this number."""
    padded: bool = False
    """Whether every run has as many queries."""
    whole_blocks: bool = True
    """Whether the keys behind the last ones, in the same block, are computed too: a causal query sees none of them."""

    @classmethod
    def of(cls, run: int | None, block_size: int, *, causal: bool) -> "_Cut":
        """For runs of keys of a fixed length, or of any."""
        if run is None:
            return cls(whole_blocks=causal)
        return cls(cpu_fixed.QUERIES, run // math.gcd(run, block_size), padded=True)


def _runs(meta: AttentionMeta, block_size: int, scores: _Scores, cut: _Cut) -> list[_Run]:
    window = scores.window
    runs, start = [], 0
    for sequence, queries, keys in zip(meta.sequences, meta.query_lens, meta.kv_lens, strict=True):
        for offset in range(0, queries if keys else 0, cut.queries):
            count = min(cut.queries, queries - offset)
            position = keys - queries + offset
            skipped = 0 if window is None else max(0, position - window + 1) // block_size // cut.blocks * cut.blocks
            end = position + count
            if not scores.causal:
                end = keys if window is None else min(keys, end + window - 1)
            before = skipped * block_size
            runs.append(_Run(sequence, start + offset, count, skipped, position - before, end - before))
        start += queries
    return runs


def _pack(runs: list[_Run], most_keys: int) -> list[list[_Run]]:
    """Runs of like size together, so that padding costs at most half as much again as the work itself."""
    packs: list[list[_Run]] = []
    for single in (True, False):
        chosen = [run for run in runs if (run.count == 1) == single]
        if not _fits(chosen, most_keys):
            chosen.sort(key=lambda run: (run.end, run.count))
        while chosen:
            size = _longest_fit(chosen, most_keys)
            packs.append(chosen[:size])
            chosen = chosen[size:]
    return packs


def _longest_fit(runs: list[_Run], most_keys: int) -> int:
    """How many of the first runs go together."""
    low, high = 1, len(runs)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(runs[:middle], most_keys) else (low, middle - 1)
    return low


def _fits(runs: list[_Run], most_keys: int) -> bool:
    if len(runs) < 2:
        return True
    queries, keys = max(run.count for run in runs), max(run.end for run in runs)
    padded = len(runs) * queries * keys
    return len(runs) * keys <= most_keys and padded <= 1.5 * sum(run.count * run.end for run in runs)


def _group(meta: AttentionMeta, runs: list[_Run], block_size: int, cut: _Cut) -> _Group:
    queries, keys = cut.queries if cut.padded else max(run.count for run in runs), max(run.end for run in runs)
    blocks = -(-keys // (block_size * cut.blocks)) * cut.blocks
    even = all(run.count == queries for run in runs)
    rows = [row for run in runs for row in range(run.first, run.first + run.count)]
    in_place = even and rows == list(range(rows[0], rows[0] + len(rows)))
    padded = rows if even else [min(run.first + i, run.first + run.count - 1) for run in runs for i in range(queries)]
    places = [place * queries + i for place, run in enumerate(runs) for i in range(run.count)]
    ends = torch.tensor([run.end for run in runs])
    return _Group(
        rows=None if in_place else torch.tensor(padded),
        first=rows[0],
        places=None if even else torch.tensor(places),
        targets=None if even else torch.tensor(rows),
        blocks=_blocks(meta.block_tables, runs, blocks),
        positions=torch.tensor([run.position for run in runs]),
        ends=ends,
        blank=(torch.arange(blocks * block_size) >= ends.unsqueeze(1)).flatten().nonzero().squeeze(1),
        size=(len(runs), queries, blocks * block_size if cut.whole_blocks else keys),
    )


def _blocks(tables: Tensor, runs: list[_Run], count: int) -> Tensor:
    """The next `count` cache blocks of each run, behind those that it skips: [runs * count]."""
    own = tables[[run.sequence for run in runs]]
    if not any(run.skipped for run in runs) and count <= tables.shape[1]:
        return own[:, :count].flatten()
    places = torch.tensor([run.skipped for run in runs]).unsqueeze(1) + torch.arange(count)
    return own.gather(1, places.clamp_(max=tables.shape[1] - 1)).flatten()
