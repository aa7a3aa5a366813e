"""Attention over the paged cache, its heads divided over the ranks.

Shapes: t tokens, h hidden, n query heads and m key/value heads of this rank, d head size.
"""

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.core.config import AttentionConfig
from hasten.layers.linear import ColumnLinear, RowLinear
from hasten.layers.position import alibi_slopes
from hasten.parallel.groups import tensor_group


class Attention(nn.Module):
    """Fused QKV, cache write, attention and output projection."""

    key_cache: Tensor
    value_cache: Tensor
    """[blocks, block size, m, d] each; the runner gives them before the first step."""

    def __init__(self, hidden_size: int, config: AttentionConfig, *, bias: bool) -> None:
        super().__init__()
        group = tensor_group()
        self.head_size = config.head_size
        self.num_heads = config.num_heads // group.size
        self.num_kv_heads = config.num_kv_heads // group.size
        self.scale = config.head_size**-0.5
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        self.qkv = ColumnLinear(hidden_size, width, bias=bias)
        self.dense = RowLinear(config.num_heads * config.head_size, hidden_size, bias=bias)
        first = group.rank * self.num_heads
        with torch.device("cpu"):
            self.slopes_n = alibi_slopes(config.num_heads)[first : first + self.num_heads]

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Take the caches of this layer, and what else must stand on their device."""
        self.key_cache, self.value_cache = key_cache, value_cache
        self.slopes_n = self.slopes_n.to(key_cache.device)

    def forward(
        self, x_th: Tensor, meta: ops.AttentionMeta, residual_th: Tensor, *, last: bool = False
    ) -> Tensor | ops.PartialSum:
        """`residual_th` + attention of each token over its sequence: [t, h].

        In the `last` layer only for the tokens of `meta.output_part`, where there is one; all leave keys and values.
        """
        query_tnd = self.qkv.project(x_th, self.key_cache, self.value_cache, meta.slot_mapping, self.num_heads)
        if last and meta.output_part is not None:
            meta = meta.output_part
        out_tnd = ops.paged_attention(query_tnd, self.key_cache, self.value_cache, meta, self.scale, self.slopes_n)
        return self.dense(out_tnd.flatten(1), residual_th, meta.output_indices)
