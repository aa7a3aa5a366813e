"""From fused projections to queries and the cache, on a CPU."""

import torch
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.cache_scales import CacheScales
from hasten.ops.cpu.norms import is_plain
from hasten.ops.cpu.products import linear
from hasten.ops.heads import HeadTransform
from hasten.ops.packed import PackedLinear


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
        or not is_plain(qkv_to)
        or not has_kernel(kernels, num_heads, key_cache, scales)
        or (transform is not None and not transform.only_turns)
        or slots_t.dtype != torch.int64
    ):
        return reference.store_heads(qkv_to, key_cache, value_cache, slots_t, num_heads, transform, scales=scales)
    table, positions, interleaved = None, None, False
    if transform is not None:
        table, positions, interleaved = transform.table_pr, transform.positions_t.long(), transform.interleaved
    caches = (key_cache, value_cache)
    return kernels.attention.store_heads(qkv_to, *caches, slots_t, num_heads, table, positions, interleaved=interleaved)


def has_kernel(kernels: native.Kernels, heads: int, key_cache: Tensor, scales: CacheScales | None) -> bool:
    """Whether the kernels of attention work on heads and caches of this form."""
    key_heads, size = key_cache.shape[2:]
    is_known = scales is None and key_cache.dtype in kernels.attention.CACHES
    return is_known and kernels.attention.fits(heads, key_heads, size)
