"""From fused projections to queries and the cache."""

import torch
from torch import Tensor

from hasten.ops.cache_scales import CacheScales, octets, stored
from hasten.ops.heads import HeadTransform
from hasten.ops.packed import PackedLinear
from hasten.ops.reference.norms import wide
from hasten.ops.reference.products import linear


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
    x_tnd = wide(heads_tnd)
    if weight_d is not None:
        weight_nd = wide(weight_d).unflatten(0, (-1, x_tnd.shape[2])) + transform.unit_offset
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
        octets(cache).view(-1, width).index_copy_(0, slots_t, octets(new_tmd.to(cache.dtype)).reshape(-1, width))
