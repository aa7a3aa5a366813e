"""Attention over the paged cache, its heads divided over the ranks.

Shapes: t tokens, h hidden, n query heads and m key/value heads of this rank, d head size.
"""

from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.core.model_config import AttentionConfig
from hasten.layers.linear import ColumnLinear, QKVLinear, RowLinear
from hasten.layers.norm import HeadNorm
from hasten.layers.position import RelativeBias, RopeTables, alibi_slopes
from hasten.parallel.groups import ALONE, TensorGroup
from hasten.parallel.shard import shard_config


class Attention(nn.Module):
    """QKV projection, norm and rotation of heads, cache write, attention and output projection of one layer."""

    key_cache: Tensor
    value_cache: Tensor
    """[blocks, block size, m, d] each; the runner gives them before the first step."""
    cache_scales: ops.CacheScales | None
    """Those of caches of 8 bits; None where caches have the model's type."""

    def __init__(
        self,
        hidden_size: int,
        config: AttentionConfig,
        *,
        norm_eps: float = 0.0,
        unit_offset: bool = False,
        relative_bias: RelativeBias | None = None,
        group: TensorGroup = ALONE,
    ) -> None:
        """`norm_eps`, `unit_offset`: of the norms of queries and keys, where the configuration has them.

        `relative_bias`: that of the model, which all layers share.
        """
        super().__init__()
        heads = shard_config(config, group.size)
        self.config = config
        self.head_size, self.num_heads, self.num_kv_heads = heads.head_size, heads.num_heads, heads.num_kv_heads
        self.scale = config.head_size**-0.5 if config.scale is None else config.scale
        self.qkv = QKVLinear(hidden_size, heads, bias=config.qkv_bias, clip=config.qkv_clip, group=group)
        self.norm_eps, self.unit_offset = norm_eps, unit_offset
        self.query_norm, self.key_norm = (
            None if config.qk_norm is None else HeadNorm(config.qk_norm, count, heads.head_size)
            for count in (heads.num_heads, heads.num_kv_heads)
        )
        self.dense = RowLinear(config.num_heads * config.head_size, hidden_size, bias=config.dense_bias, group=group)
        self.sinks = nn.Parameter(torch.empty(heads.num_heads), requires_grad=False) if config.sinks else None
        self.relative_bias = [] if relative_bias is None else [relative_bias]  # in a list: its weight is the model's
        self.rope_table: Tensor | None = None
        self.slopes_n: Tensor | None = None
        if config.position == "alibi":
            first = group.rank * self.num_heads
            with torch.device("cpu"):
                self.slopes_n = alibi_slopes(config.num_heads, config.alibi_bias_max)[first : first + self.num_heads]
                self.slopes_n *= self.scale if config.alibi_scaled else 1.0

    def bind_cache(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        ropes: RopeTables | None = None,
        scales: ops.CacheScales | None = None,
    ) -> None:
        """Take the caches of this layer, and what else must stand on their device."""
        self.key_cache, self.value_cache, self.cache_scales = key_cache, value_cache, scales
        if self.slopes_n is not None:
            self.slopes_n = self.slopes_n.to(key_cache.device)
        if self.config.rope is not None:
            assert ropes is not None
            self.rope_table = ropes.of(self.config.rope)

    def _transform(self, positions_t: Tensor) -> ops.HeadTransform | None:
        if self.rope_table is None and self.query_norm is None:
            return None
        rope = self.config.rope
        interleaved = rope is not None and rope.interleaved
        transform = ops.HeadTransform(positions_t=positions_t, table_pr=self.rope_table, interleaved=interleaved)
        if self.query_norm is None or self.key_norm is None:
            return transform
        return replace(
            transform,
            query_norm_d=self.query_norm.weight,
            key_norm_d=self.key_norm.weight,
            query_bias_d=self.query_norm.bias,
            key_bias_d=self.key_norm.bias,
            rms=self.config.qk_norm in ("rms", "rms_of_all_heads"),
            eps=self.norm_eps,
            unit_offset=self.unit_offset,
        )

    def forward(
        self,
        x_th: ops.Inputs,
        positions_t: Tensor,
        meta: ops.AttentionMeta,
        residual_th: Tensor | None,
        *,
        last: bool = False,
    ) -> Tensor | ops.PartialSum:
        """`residual_th` + attention of each token over its sequence: [t, h].

        In the `last` layer only for the tokens of `meta.output_part`, where there is one; all leave keys and values.
        """
        transform, scales = self._transform(positions_t), self.cache_scales
        query_tnd, keys, values = self.qkv(
            x_th,
            self.key_cache,
            self.value_cache,
            meta.slot_mapping,
            transform,
            scales=scales,
            consecutive=meta.consecutive,
        )
        if last and meta.output_part is not None:
            meta = meta.output_part
        out_tnd = ops.paged_attention(
            query_tnd,
            keys,
            values,
            meta,
            self.scale,
            self.slopes_n,
            window=self.config.window,
            softcap=self.config.softcap,
            sinks_n=self.sinks,
            causal=self.config.causal,
            bias_nr=self.relative_bias[0].bias_nr if self.relative_bias else None,
            scales=scales,
        )
        return self.dense(out_tnd.flatten(1), residual_th, meta.output_indices)


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens over the keys and values that the encoder left in the paged cache."""

    key_cache: Tensor
    value_cache: Tensor
    """As those of `Attention`."""

    def __init__(self, hidden_size: int, config: AttentionConfig, *, group: TensorGroup = ALONE) -> None:
        super().__init__()
        heads = shard_config(config, group.size)
        self.head_size, self.num_heads, self.num_kv_heads = heads.head_size, heads.num_heads, heads.num_kv_heads
        self.scale = config.head_size**-0.5 if config.scale is None else config.scale
        width, kv_width = (count * config.head_size for count in (config.num_heads, config.num_kv_heads))
        self.query = ColumnLinear(hidden_size, width, bias=config.qkv_bias, group=group)
        self.key_value = ColumnLinear(hidden_size, 2 * kv_width, bias=config.qkv_bias, group=group)
        self.dense = RowLinear(width, hidden_size, bias=config.dense_bias, group=group)

    def bind_cache(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        ropes: RopeTables | None = None,
        scales: ops.CacheScales | None = None,
    ) -> None:
        """Take the caches of this layer, which have the model's type."""
        assert scales is None
        self.key_cache, self.value_cache = key_cache, value_cache

    def store(self, encoded_th: Tensor, slots_t: Tensor) -> None:
        """Leave the keys and values of what the encoder made of its input, [t, h], at these slots of the cache."""
        heads = (2, self.num_kv_heads, self.head_size)
        key_tmd, value_tmd = self.key_value(encoded_th).view(-1, *heads).unbind(1)
        ops.write_cache(key_tmd, value_tmd, self.key_cache, self.value_cache, slots_t)

    def forward(
        self, x_th: Tensor, meta: ops.AttentionMeta, residual_th: Tensor | None, *, last: bool = False
    ) -> Tensor | ops.PartialSum:
        """`residual_th` + attention of each token over what the encoder left for its sequence: [t, h].

        In the `last` layer the tokens are those of `meta.output_part` alone, where there is one.
        """
        whole = meta if not last or meta.output_part is None else meta.output_part
        assert whole.cross is not None
        query_tnd = self.query(x_th).view(-1, self.num_heads, self.head_size)
        caches = (self.key_cache, self.value_cache)
        out_tnd = ops.paged_attention(query_tnd, *caches, whole.cross, self.scale, causal=False)
        return self.dense(out_tnd.flatten(1), residual_th)
