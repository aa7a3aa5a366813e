"""Mixtral: Mistral with a mixture of experts in place of each MLP.

Shapes: t tokens of the flat batch, h hidden.
Source: Jiang et al., "Mixtral of Experts", 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.model_config import ExpertsConfig, ModelConfig
from hasten.layers.attention import Attention
from hasten.layers.experts import Experts
from hasten.layers.norm import RMSNorm
from hasten.models import hf_config
from hasten.models.llama import (
    LlamaForCausalLM,
    attention_from_hf,
    config_from_hf,
    weight_map_of,
    weights_before_mlp,
)
from hasten.models.weight_map import WeightMap, WeightSpec, experts
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups

_MAX_POSITION, _EPS = 131_072, 1e-5


class MixtralBlock(nn.Module):
    """One layer: attention and a mixture of experts, each behind a norm and added to a residual."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__()
        group = groups.tensor
        assert config.experts is not None
        hidden, eps = config.hidden_size, config.norm_eps
        self.last = layer == config.num_layers - 1
        self.input_norm = RMSNorm(hidden, eps=eps, group=group)
        self.attention = Attention(hidden, config.attention_of(layer), norm_eps=eps, group=group)
        self.post_norm = RMSNorm(hidden, eps=eps, group=group)
        self.experts = Experts(hidden, config.experts, gate=config.activation, groups=groups)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> PartialSum:
        """Hidden states after this layer, as a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        x_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        return self.experts(x_th, self.post_norm, meta.output_rows(meta.slot_mapping, last=self.last))


class MixtralForCausalLM(LlamaForCausalLM):
    """Mixtral with its language model head."""

    block: ClassVar[type[nn.Module]] = MixtralBlock
    hf_harmless: ClassVar[frozenset[str]] = LlamaForCausalLM.hf_harmless | {
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    }

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, in which `intermediate_size` is that of an expert."""
        attention = attention_from_hf(raw, max_position=_MAX_POSITION, kv_heads=8, theta=1e6)
        attention = replace(attention, window=hf_config.optional_count(raw, "sliding_window", None))
        config = config_from_hf(raw, "MixtralForCausalLM", attention, max_position=_MAX_POSITION, bos=1, eos=2)
        experts = ExpertsConfig(
            num_experts=hf_config.count(raw, "num_local_experts", default=8),
            top_k=hf_config.count(raw, "num_experts_per_tok", default=2),
            inner_size=config.intermediate_size,
            normalized=True,
        )
        return replace(config, norm_eps=hf_config.fraction(raw, "rms_norm_eps", _EPS), experts=experts)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map_of(config, partial(_of_layer, config))


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    assert config.experts is not None
    name, count = f"layers.{layer}", config.experts.num_experts
    yield from weights_before_mlp(config, layer)
    yield from experts(f"{name}.experts", f"{name}.block_sparse_moe", ("w1", "w3", "w2"), count, stacked=f"{name}.mlp")
