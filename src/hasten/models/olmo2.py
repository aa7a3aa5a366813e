"""OLMo 2: LLaMA with norms behind each part instead of before it, and norms of all queries and of all keys together.

Shapes: t tokens of the flat batch, h hidden.
Source: OLMo Team, "2 OLMo 2 Furious", 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.model_config import ModelConfig
from hasten.layers.attention import Attention
from hasten.layers.mlp import GatedMLP
from hasten.layers.norm import RMSNorm
from hasten.models import hf_config
from hasten.models.llama import (
    LlamaForCausalLM,
    attention_from_hf,
    attention_weights,
    config_from_hf,
    mlp_weights,
    weight_map_of,
)
from hasten.models.weight_map import WeightMap, WeightSpec, norm
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split

MAX_POSITION = 2048


class Olmo2Block(nn.Module):
    """One layer: attention and gated MLP, each normed and then added to what it read."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.group = group = groups.tensor
        self.last = layer == config.num_layers - 1
        self.attention = Attention(hidden, config.attention_of(layer), norm_eps=eps, group=group)
        self.post_attention_norm = RMSNorm(hidden, eps=eps, group=group)
        self.mlp = GatedMLP(
            hidden, config.intermediate_size, activation=config.activation, bias=config.mlp_bias, group=group
        )
        self.post_mlp_norm = RMSNorm(hidden, eps=eps, group=group)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after this layer: [t, h]."""
        x_th = self.group.complete(x_th)
        added_th, _ = self.post_attention_norm(self.attention(x_th, positions_t, meta, None, last=self.last))
        x_th = meta.output_rows(x_th, last=self.last) + added_th
        added_th, _ = self.post_mlp_norm(self.mlp(x_th, None))
        return x_th + added_th


class Olmo2ForCausalLM(LlamaForCausalLM):
    """OLMo 2 with its language model head."""

    block: ClassVar[type[nn.Module]] = Olmo2Block

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with the rope under its keys of old and new versions."""
        return olmo_from_hf(raw, "Olmo2ForCausalLM")

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map_of(config, lambda layer: _of_layer(config, layer))


def olmo_from_hf(raw: Mapping[str, Any], architecture: str, **rope: Any) -> ModelConfig:
    """What OLMo 2 and 3 have in common; `rope`: keywords of `attention_from_hf` for it."""
    bias = hf_config.flag(raw, "attention_bias", False)
    attention = attention_from_hf(raw, max_position=MAX_POSITION, **rope)
    attention = replace(attention, qkv_bias=bias, dense_bias=bias, qk_norm="rms_of_all_heads")
    config = config_from_hf(raw, architecture, attention, max_position=MAX_POSITION, eos=50_279)
    config = replace(config, norm_eps=hf_config.fraction(raw, "rms_norm_eps", 1e-5))
    return replace(config, pad_token_id=hf_config.token(raw, "pad_token_id", 1))


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    name = f"layers.{layer}"
    ours, theirs = f"{name}.attention", f"{name}.self_attn"
    yield from attention_weights(config, layer)
    yield from norm(f"{ours}.query_norm", f"{theirs}.q_norm", bias=False, axis="query", split=Split.COLUMN)
    yield from norm(f"{ours}.key_norm", f"{theirs}.k_norm", bias=False, axis="kv", split=Split.KV)
    yield from norm(f"{name}.post_attention_norm", f"{name}.post_attention_layernorm", bias=False)
    yield from mlp_weights(config, layer, "mlp.")
    yield from norm(f"{name}.post_mlp_norm", f"{name}.post_feedforward_layernorm", bias=False)
