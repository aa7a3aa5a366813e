"""From fused projections through the paged cache to attention."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.ops import cpu, plan, reference
from hasten.ops.cache_scales import CacheScales
from hasten.ops.heads import HeadTransform
from hasten.ops.meta import AttentionMeta
from hasten.ops.packed import PackedLinear
from hasten.ops.rounding import Inputs

if TYPE_CHECKING:
    pass


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
    return cpu.heads.project(
        x_th, weight, bias_o, key_cache, value_cache, slots_t, num_heads, transform, clip=clip, scales=scales
    )


def project_consecutive(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`project` for a step whose keys and values no later one reads.

    Caches are [t or more, 1, m, d], and slots are 0 to t - 1, or -1 to store nothing. The queries [t, n, d] come back,
    and keys and values in that form: those caches, or where the product left them itself.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.project_consecutive(
            x_th, weight, bias_o, key_cache, value_cache, slots_t, num_heads, transform, clip=clip
        )
    queries_tnd = project(x_th, weight, bias_o, key_cache, value_cache, slots_t, num_heads, transform, clip=clip)
    return queries_tnd, key_cache, value_cache


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
    return cpu.heads.store_heads(qkv_to, key_cache, value_cache, slots_t, num_heads, transform, scales=scales)


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
    return cpu.attention.paged_attention(
        *operands, window=window, softcap=softcap, sinks_n=sinks_n, causal=causal, bias_nr=bias_nr, scales=scales
    )


def fixed_run(device: torch.device, max_kv_len: int) -> int:
    """Keys of a run (`AttentionMeta.run`) for attention in a fixed order over sequences up to a length."""
    return cpu.fixed.RUN if device.type == "cpu" else plan.fixed_run(max_kv_len)
