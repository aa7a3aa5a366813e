"""Typed tensor operations: the only room that asks which device a tensor is on.

Each function is defined in `reference.py`, in plain torch; `cpu.py`, `cpu_edits.py`, `cpu_sampling.py` and `gpu/` hold
faster paths with the same signatures. The kernels of `gpu/` are imported when the first tensor on a GPU comes by.
Shapes: t tokens of the flat batch, h hidden, o output features, n heads, m key/value heads, d head size, v vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from hasten.core.dtypes import CacheDType, DTypeName
from hasten.core.model_config import Activation, GatedUnit
from hasten.ops import beams, cpu, cpu_bf16, cpu_edits, cpu_fixed, cpu_sampling, native, plan, reference
from hasten.ops.beams import BeamChoice, BeamMoves, BeamSearches, BeamStates, Search
from hasten.ops.block_caches import BlockCaches
from hasten.ops.cache_scales import CacheScales
from hasten.ops.draws import NONE_LEFT, Draws
from hasten.ops.edits import Bans, EditList, LogitEdits, TokenCounts
from hasten.ops.grouped import Columns, GroupedWeight, pack_nibbles, packs
from hasten.ops.heads import HeadTransform
from hasten.ops.logprobs import TopLogprobs
from hasten.ops.meta import AttentionMeta
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.order import fixed_order
from hasten.ops.packed import PackedLinear, QuantizedWeight, Weight, moved
from hasten.ops.partial_sum import PartialSum
from hasten.ops.rounding import Inputs, RoundedRows, multiplies
from hasten.ops.transfer import HostCopy, Upload, to_device

if TYPE_CHECKING:
    from hasten.ops.native.record import Recording

TORCH_DTYPES: dict[DTypeName, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""torch's types by the names of the configuration."""

CACHE_DTYPES: dict[CacheDType, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Types of 8 bits that the key/value cache may have, by the names of the configuration."""

__all__ = [
    "CACHE_DTYPES",
    "NONE_LEFT",
    "TORCH_DTYPES",
    "Activation",
    "AttentionMeta",
    "Bans",
    "BeamChoice",
    "BeamMoves",
    "BeamSearches",
    "BeamStates",
    "BlockCaches",
    "CacheScales",
    "Columns",
    "Draws",
    "EditList",
    "GatedUnit",
    "GroupedWeight",
    "HeadTransform",
    "HostCopy",
    "Inputs",
    "LogitEdits",
    "PackedExperts",
    "PackedLinear",
    "PartialSum",
    "QuantizedWeight",
    "RoundedRows",
    "Routing",
    "Search",
    "TokenCounts",
    "TopLogprobs",
    "Upload",
    "Weight",
    "add_linear",
    "any_compiled",
    "await_count",
    "choose_beams",
    "compiled_together",
    "copy_blocks",
    "count_tokens",
    "cpu_multiplies",
    "default_device",
    "draw",
    "edit_logits",
    "embedding",
    "embedding_norm",
    "experts",
    "fixed_order",
    "fixed_run",
    "gated_linear",
    "greedy",
    "largest",
    "library_rows",
    "linear",
    "linear_parts",
    "mask_logits",
    "mean_squares",
    "move_beams",
    "moved",
    "multiplies",
    "norm",
    "norm_route",
    "pack_experts",
    "pack_linear",
    "pack_nibbles",
    "packs",
    "paged_attention",
    "project",
    "recorded",
    "records",
    "resolve_ids",
    "route",
    "set_count",
    "store_heads",
    "to_device",
    "top_logprobs",
    "write_cache",
]


def embedding(ids_t: Tensor, weight_vh: Weight, first: int | None = None) -> Tensor:
    """Rows of `weight_vh` for token ids [t].

    With `first`, the weight is a shard of the vocabulary that begins there: ids outside it, which other ranks hold,
    give zeros.
    """
    if ids_t.is_cuda:
        return reference.embedding(ids_t, weight_vh, first)
    return cpu.embedding(ids_t, weight_vh, first)


@overload
def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: PackedLinear | None,
) -> tuple[Inputs, Tensor]: ...


def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: PackedLinear | None = None,
) -> tuple[Inputs, Tensor]:
    """Layer norm over the last axis: [t, h], and with it what was normed, a sum added up: [t, h].

    `reader`: the weight that alone multiplies the norm, which may be rounded as that needs it. With `rms`, the root
    mean square norm, which subtracts no mean; with `unit_offset` its weight is `weight_h` + 1.
    Sources: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang, Sennrich, "Root Mean Square Layer Normalization",
    2019.
    """
    if weight_h.is_cuda:
        from hasten.ops.gpu import norm as kernels

        return kernels.norm(x_th, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset, reader=reader)
    return cpu.norm(x_th, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset)


def embedding_norm(ids_t: Tensor, table_vh: Weight, weight_h: Tensor, bias_h: Tensor, eps: float) -> Tensor:
    """The layer norm of rows of a table: [t, h]."""
    if table_vh.is_cuda:
        from hasten.ops.gpu import norm as kernels

        return kernels.embedding_norm(ids_t, table_vh, weight_h, bias_h, eps)
    return cpu.embedding_norm(ids_t, table_vh, weight_h, bias_h, eps)


def pack_linear(weight_oh: Weight, *, shared: bool = False) -> PackedLinear:
    """Lay out a weight [o, h] once for `linear` on the device that it is on; the weight itself may then be dropped.

    A `shared` weight stays in use elsewhere: it is not copied unless the device cannot compute on it as it is, or is
    several times as fast with another layout.
    """
    if weight_oh.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.pack_linear(weight_oh, shared)
    return cpu.pack_linear(weight_oh, shared)


@overload
def linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None = None,
    *,
    activation: Activation | None = None,
    reader: None = None,
) -> Tensor: ...


@overload
def linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None = None,
    *,
    activation: Activation | None = None,
    reader: PackedLinear | None,
) -> Inputs: ...


def linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None = None,
    *,
    activation: Activation | None = None,
    reader: PackedLinear | None = None,
) -> Inputs:
    """`activation(x @ weight.T + bias)`, [t, o] in the type of `x_th`, summed in at least fp32.

    `reader`: the weight that alone multiplies the result, which may be rounded as that needs it.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.linear(x_th, weight, bias_o, activation, reader)
    assert isinstance(x_th, Tensor)
    return cpu.linear(x_th, weight, bias_o, activation)


@overload
def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: Activation,
    scale_1h: Tensor | None = None,
    reader: None = None,
) -> Tensor: ...


@overload
def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: Activation,
    scale_1h: Tensor | None = None,
    *,
    reader: PackedLinear | None,
) -> Inputs: ...


def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: Activation,
    scale_1h: Tensor | None = None,
    reader: PackedLinear | None = None,
) -> Inputs:
    """`gate(a) * b`, [t, o / 2], where `a` and `b` are the halves of `x @ weight.T + bias`.

    With `scale_1h`, times `sigmoid(x @ scale.T)`, computed in at least fp32. `reader`: see `linear`.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import gated

        return gated.gated_linear(x_th, weight, bias_o, gate, scale_1h, reader=reader)
    assert isinstance(x_th, Tensor)
    return cpu.gated_linear(x_th, weight, bias_o, gate, scale_1h)


def add_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    residual_to: Tensor | PartialSum | None,
    rows_t: Tensor | None = None,
) -> Tensor | PartialSum:
    """`residual + x @ weight.T + bias`, [t, o]; or what it is the sum of, where the norm that reads it adds for free.

    With `rows_t`, the residual has more rows and these are the ones to take. A residual may be the sum that another
    product left, as in a parallel residual; it then has these rows already.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        parts = matmul.linear_parts(x_th, weight, whole=isinstance(residual_to, PartialSum))
        if isinstance(residual_to, PartialSum):
            return residual_to.plus(parts, bias_o)
        return PartialSum(parts, bias_o, residual_to, rows_t)
    assert isinstance(x_th, Tensor)
    return cpu.add_linear(x_th, weight, bias_o, residual_to, rows_t)


def linear_parts(x_th: Inputs, weight: PackedLinear, *, whole: bool = False) -> Tensor:
    """`x @ weight.T`, [t, o]; or, where that is faster, parts of it to be added up, [parts, t, o] in fp32.

    `whole`: it is the second product of a sum, which in a fixed order must not be in parts.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.linear_parts(x_th, weight, whole=whole)
    assert isinstance(x_th, Tensor)
    return cpu.linear(x_th, weight, None, None)


def route(
    x_th: Tensor,
    router_eh: Tensor,
    top_k: int,
    normalized: bool,
    slots_t: Tensor | None = None,
    *,
    bias_e: Tensor | None = None,
    fixed_order: bool = False,
) -> Routing:
    """The `top_k` most probable experts of each token by `softmax(x @ router.T + bias)` in fp32.

    The first among equals is taken. Their probabilities are the weights of their outputs, or where `normalized` divided
    by their sum. The last tokens may be padding, which has no cache slot in `slots_t` [t] (-1) and may go to any
    experts. With `fixed_order`, other tokens change no bit of a token's weights. Source: Shazeer et al., "Outrageously
    Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import router

        return router.route(x_th, router_eh, top_k, normalized, slots_t, bias_e=bias_e, fixed_order=fixed_order)
    return cpu.route(x_th, router_eh, top_k, normalized, bias_e, fixed_order)


def norm_route(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    eps: float,
    router_eh: Tensor,
    top_k: int,
    normalized: bool,
    slots_t: Tensor | None = None,
    *,
    unit_offset: bool = False,
    bias_e: Tensor | None = None,
    fixed_order: bool = False,
) -> tuple[Tensor, Tensor, Routing]:
    """`norm` with `rms`, and `route` of its result: the norm, what was normed, and the experts of each token."""
    alone = weight_h.is_cuda and x_th.shape[0] == 1 and not fixed_order
    if alone and isinstance(x_th, PartialSum) and x_th.peers is None:
        from hasten.ops.gpu import router

        return router.norm_route(
            x_th, weight_h, eps, router_eh, top_k, normalized, unit_offset=unit_offset, bias_e=bias_e
        )
    normed_th, total_th = norm(x_th, weight_h, None, eps, rms=True, unit_offset=unit_offset)
    routing = route(normed_th, router_eh, top_k, normalized, slots_t, bias_e=bias_e, fixed_order=fixed_order)
    return normed_th, total_th, routing


def pack_experts(
    gate_up_eih: Tensor,
    down_ehi: Tensor,
    first: int = 0,
    *,
    gate_up_bias_ei: Tensor | None = None,
    down_bias_eh: Tensor | None = None,
) -> PackedExperts:
    """Lay out experts' weights [e, 2 * i, h] and [e, h, i] once for `experts`, which then has no use for them.

    `first`: the number of the first of them, where other ranks hold others. Biases are [e, 2 * i] and [e, h].
    """
    if gate_up_eih.is_cuda:
        from hasten.ops.gpu import experts as kernels

        return kernels.pack_experts(gate_up_eih, down_ehi, first, gate_up_bias_ei, down_bias_eh)
    return cpu.pack_experts(gate_up_eih, down_ehi, first, gate_up_bias_ei, down_bias_eh)


def experts(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:
    """Sums of the experts that tokens go to, each times its weight: [t, h], or parts to be added up, [k, t, h] in fp32.

    An expert is a gated unit of the halves of `x @ gate_up.T + gate_up_bias`, and the linear layer behind it,
    `inner @ down.T + down_bias`. Experts that other ranks hold count as zero.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import experts as kernels

        return kernels.experts(x_th, weights, routing, unit)
    return cpu.experts(x_th, weights, routing, unit)


def project(
    x_th: Inputs,
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
    """Fused queries, keys and values: queries [t, n, d] come back, the rest goes to the caches as `write_cache` says.

    The weight's output features are the queries of all n heads, then the keys of all m, then the values. All three are
    limited to between -`clip` and `clip`, if that is given; then queries and keys are changed by `transform`, computed
    in at least fp32.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.project(
            x_th, weight, bias_o, key_cache, value_cache, slots_t, num_heads, transform, clip=clip, scales=scales
        )
    assert isinstance(x_th, Tensor)
    return cpu.project(
        x_th, weight, bias_o, key_cache, value_cache, slots_t, num_heads, transform, clip=clip, scales=scales
    )


def mean_squares(qkv_to: Tensor, num_heads: int, kv_heads: int, head_size: int, ranks: int) -> Tensor:
    """The mean squares of all queries, and of all keys, of a fused projection [t, o]: [t, 2] in fp32.

    They are divided by `ranks`, so that those of ranks with equally many heads add up to the whole's.
    """
    if qkv_to.is_cuda:
        from hasten.ops.gpu import heads

        return heads.mean_squares(qkv_to, num_heads, kv_heads, head_size, ranks)
    return reference.mean_squares(qkv_to, num_heads, kv_heads, head_size, ranks)


def store_heads(
    qkv_to: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    num_heads: int,
    transform: HeadTransform,
    *,
    scales: CacheScales | None = None,
) -> Tensor:
    """The second half of `project`: from the fused projection [t, o] to queries [t, n, d] and the caches."""
    if qkv_to.is_cuda:
        from hasten.ops.gpu import heads

        return heads.store_heads(qkv_to, key_cache, value_cache, slots_t, num_heads, transform, scales=scales)
    return cpu.store_heads(qkv_to, key_cache, value_cache, slots_t, num_heads, transform, scales=scales)


def write_cache(
    key_tmd: Tensor,
    value_tmd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    *,
    scales: CacheScales | None = None,
) -> None:
    """Store keys and values [t, m, d] in caches [blocks, block size, m, d] at `slots_t`; -1 stores nothing.

    With `scales`, caches are in int8 or fp8 (e4m3): values are divided by the scale of their head, limited to what the
    type holds and rounded to the nearest.
    """
    if key_tmd.is_cuda:
        from hasten.ops.gpu import cache

        cache.write_cache(key_tmd, value_tmd, key_cache, value_cache, slots_t, scales=scales)
    else:
        reference.write_cache(key_tmd, value_tmd, key_cache, value_cache, slots_t, scales=scales)


def paged_attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    alibi_slopes_n: Tensor | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks_n: Tensor | None = None,
    causal: bool = True,
    bias_nr: Tensor | None = None,
    scales: CacheScales | None = None,
) -> Tensor:
    """Attention of each token over its own sequence in the paged cache, up to itself where `causal`: [t, n, d].

    Where `meta` is a part of a batch (`output_indices`), the queries are those of the whole batch. The keys and values
    of the batch's own tokens must be in the cache already. Scores are `scale * query . key`; with `softcap` c they
    become c * tanh(score / c). With slopes, `slope * (key position - query position)` is added to each. With `window`
    w, a token sees the last w tokens, itself included, and where not causal the next w - 1. With `bias_nr` [n, 2 * r +
    1] in fp32, `bias[key position - query position + r]` is added to each score, the ends standing for longer
    distances. With sinks, the softmax of each head has one more logit, which is neither scaled nor capped and has no
    value: it takes weight from the keys. With `scales`, keys and values are those that caches of 8 bits stand for. The
    queries of a sequence are its last tokens. Sources: Press, Smith, Lewis,
    "Train Short, Test Long", 2022 (ALiBi); Kwon et al., "Efficient Memory Management for Large Language Model Serving
    with PagedAttention", 2023; Dao, "FlashAttention-2", 2023; Beltagy, Peters, Cohan, "Longformer", 2020 (window);
    Gemma Team, "Gemma 2", 2024 (cap); OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025 (sinks).
    """
    operands = (query_tnd, key_cache, value_cache, meta, scale, alibi_slopes_n)
    if query_tnd.is_cuda:
        from hasten.ops.gpu import attention

        return attention.paged_attention(
            *operands, window=window, softcap=softcap, sinks_n=sinks_n, causal=causal, bias_nr=bias_nr, scales=scales
        )
    return cpu.paged_attention(
        *operands, window=window, softcap=softcap, sinks_n=sinks_n, causal=causal, bias_nr=bias_nr, scales=scales
    )


def fixed_run(device: torch.device, max_kv_len: int) -> int:
    """Keys of a run (`AttentionMeta.run`) for attention in a fixed order over sequences up to a length."""
    return cpu_fixed.RUN if device.type == "cpu" else plan.fixed_run(max_kv_len)


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has products of weights in a floating-point type, and so gains by it."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_bf16.is_supported())


def resolve_ids(ids_t: Tensor, chosen_r: Tensor) -> Tensor:
    """Token ids [t] with those below 0 replaced: -1 - i stands for `chosen_r[i]`, and for token 0 if that is below 0.

    So a step can read tokens that the step before chose and only the device knows.
    """
    if ids_t.is_cuda:
        from hasten.ops.gpu import cache

        return cache.resolve_ids(ids_t, chosen_r)
    return reference.resolve_ids(ids_t, chosen_r)


def await_count(count: Tensor, number: int, abort_flag: Tensor) -> None:
    """Let what follows on this device wait until `count`, int32 [1], is at `number` or beyond it.

    It counts modulo 2^32. `abort_flag`, int32 [1] in memory of the host, ends the wait once it is not 0.
    """
    if count.is_cuda:
        from hasten.ops.gpu import signals

        return signals.await_count(count, number, abort_flag)
    return reference.await_count(count, number, abort_flag)


def set_count(count: Tensor, number: int) -> None:
    """Set a count that another device may wait for, behind all that this device has written."""
    if count.is_cuda:
        from hasten.ops.gpu import signals

        return signals.set_count(count, number)
    return reference.set_count(count, number)


def copy_blocks(caches: BlockCaches, sources_n: Tensor, targets_n: Tensor) -> None:
    """Copy whole blocks within each cache [blocks, ...]: block `targets_n[i]` becomes block `sources_n[i]` [int64].

    Targets are distinct, and none of them is a source: copies have no order.
    """
    if sources_n.is_cuda:
        from hasten.ops.gpu import cache

        cache.copy_blocks(caches, sources_n, targets_n)
    else:
        reference.copy_blocks(caches, sources_n, targets_n)


def move_beams(caches: BlockCaches, tables_sn: Tensor, moves: BeamMoves, parents: Tensor) -> None:
    """Let beams have what the beams that they continue have in the cache; block tables [s, n] are changed in place.

    Full blocks are shared; what is in the block behind them is copied into the beam's own. `parents` are the beams'
    numbers that devices keep. No beam that is continued may continue another.
    """
    if tables_sn.is_cuda:
        from hasten.ops.gpu import beams as kernels

        kernels.move_beams(caches, tables_sn, moves, parents)
    else:
        beams.move_beams(caches, tables_sn, moves, parents)


def choose_beams(
    states: BeamStates, searches: BeamSearches, values_rk: Tensor, ids_rk: Tensor, chosen_2b: Tensor, vocab: int
) -> BeamChoice:
    """How searches go on, from the most probable tokens of each beam [r, k], best first, and their log-probabilities.

    The best continuations of all beams together are looked at, those of better beams first among equals; the first
    `width` that do not end go on. Each becomes the beam that it continues if it is the first of that, and else the next
    beam that none continues. States are brought up to date, and beams get their part of `chosen_2b`. Token
    ids beyond the vocabulary, as rows that are not finite may have, become its last one.
    """
    if values_rk.is_cuda:
        from hasten.ops.gpu import beams as kernels

        return kernels.choose_beams(states, searches, values_rk, ids_rk, chosen_2b, vocab)
    return beams.choose_beams(states, searches, values_rk, ids_rk, chosen_2b, vocab)


def greedy(logits_rv: Tensor) -> Tensor:
    """The most probable token of each row, the first among equals: int32 [r].

    -1 where a logit is NaN or infinite, `NONE_LEFT` where all are minus infinity.
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import sampling

        return sampling.greedy(logits_rv)
    return cpu_sampling.greedy(logits_rv)


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:
    """Tokens drawn by temperature, min-p, top-k and top-p, in this order: int32 [r], below 0 as in `greedy`.

    Each filter keeps what is as probable as the last token it keeps, and the draw goes through the vocabulary in its
    own order: neither ties nor the filters of other rows can change which token a point stands for. Sources: Fan,
    Lewis, Dauphin, "Hierarchical Neural Story Generation", 2018 (top-k); Holtzman et al., "The Curious Case of Neural
    Text Degeneration", 2020 (top-p); Nguyen et al., "Turning Up the Heat", 2024 (min-p).
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import draw as gpu_draw

        return gpu_draw.draw(logits_rv, draws)
    return cpu_sampling.draw(logits_rv, draws)


def edit_logits(
    logits_rv: Tensor, edits: LogitEdits, counts: TokenCounts, chosen_r: Tensor, *, in_place: bool = False
) -> Tensor:
    """The logits in fp32 after penalties, then biases, then bans: [r, v]; the given ones stay as they are, unless they
    are in fp32, contiguous, and to be changed `in_place`.

    `chosen_r` [int32] are the tokens that the previous step chose, for bans that depend on the last token. Sources:
    Keskar et al., "CTRL", 2019 (repetition penalty: positive logits of tokens seen are divided by it, others
    multiplied); OpenAI's API (presence and frequency penalties over the output; logit bias).
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import edits as kernels

        return kernels.edit_logits(logits_rv, edits, counts, chosen_r, in_place=in_place)
    return cpu_edits.edit_logits(logits_rv, edits, counts, chosen_r, in_place=in_place)


def count_tokens(counts: TokenCounts, slots_r: Tensor, tokens_r: Tensor) -> None:
    """Add one token per row [int32] to the output counts of the row's slot, in place; -1 in either changes nothing.

    No two rows may have the same slot.
    """
    if tokens_r.is_cuda:
        from hasten.ops.gpu import edits as kernels

        kernels.count_tokens(counts, slots_r, tokens_r)
    else:
        cpu_edits.count_tokens(counts, slots_r, tokens_r)


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:
    """The logits with minus infinity where a row's mask has no bit: [r, v]; the given ones stay as they are.

    Row r has the mask `index_r[r]` [int32], none where that is below 0. Bit i of word w [int32] stands for token
    32 * w + i.
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import edits as kernels

        return kernels.mask_logits(logits_rv, index_r, masks_kw)
    return cpu_edits.mask_logits(logits_rv, index_r, masks_kw)


def top_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> TopLogprobs:
    """Log-probabilities and ranks of the given tokens [int32], and of the `count` most probable ones of each row.

    A token below 0 stands for token 0. Rows that are not finite have undefined values.
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import logprobs

        return logprobs.top_logprobs(logits_rv, tokens_r, count)
    return cpu_sampling.top_logprobs(logits_rv, tokens_r, count)


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest numbers of each row in descending order, and their places [int32]; of equals the first."""
    if x_rv.is_cuda:
        from hasten.ops.gpu import logprobs

        return logprobs.largest(x_rv, count)
    return cpu_sampling.largest(x_rv, count)


def any_compiled() -> bool:
    """Whether this process has kernels for a GPU, compiled or read from the cache of kernels."""
    from hasten.ops.gpu import compiling

    return compiling.any_compiled()


def library_rows(most: int) -> list[int]:
    """Numbers of rows, one for each that a GPU's library is given for products of up to `most`, in ascending order.

    What it needs is loaded when the first of its kind is computed, and who computes it in a fixed order is found out
    then; see `gpu/library.py`.
    """
    from hasten.ops.gpu import library

    return library.row_counts(most)


def compiled_together(processes: int) -> AbstractContextManager[None]:
    """A block whose kernels for a GPU are compiled by several threads, and not launched; see `gpu/compiling.py`."""
    from hasten.ops.gpu import compiling

    return compiling.compiled_together(processes)


def records() -> bool:
    """Whether kernels for a CPU are there, whose launches can be recorded."""
    return native.kernels() is not None


@contextmanager
def recorded() -> Iterator["Recording"]:
    """A block whose kernels for a CPU run, and are recorded to be run again; see `native/record.py`."""
    kernels = native.kernels()
    assert kernels is not None
    with kernels.record.recorded() as recording:
        yield recording


def default_device() -> torch.device:
    """A GPU where there is one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
