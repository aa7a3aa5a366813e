"""Qwen 1.5 and 2 with mixtures of experts: Qwen 2 with many small experts, and one that sees every token.

Source: Qwen Team, "Qwen1.5-MoE: Matching 7B Model Performance with 1/3 Activated Parameters", 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.errors import ConfigError
from hasten.core.model_config import ExpertsConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.llama import (
    LlamaBlock,
    LlamaForCausalLM,
    attention_from_hf,
    config_from_hf,
    mlp_weights,
    weight_map_of,
    weights_before_mlp,
)
from hasten.models.mixtral import MixtralBlock, MixtralForCausalLM
from hasten.models.qwen2 import MAX_POSITION, Qwen2ForCausalLM, with_windows
from hasten.models.weight_map import Axis, StoredTensor, WeightMap, WeightSpec, experts, linear
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split

_KV_HEADS, _SHARED_SIZE = 16, 5632


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    """Qwen 2 with a mixture of experts and its language model head."""

    hf_harmless: ClassVar[frozenset[str]] = MixtralForCausalLM.hf_harmless | Qwen2ForCausalLM.hf_harmless

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """One layer, with a mixture of experts or with a plain MLP."""
        assert config.experts is not None
        return (LlamaBlock if layer in config.experts.dense_layers else MixtralBlock)(config, layer, groups)

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; every second layer has a window, if any has."""
        bias = hf_config.flag(raw, "qkv_bias", True)
        attention = attention_from_hf(raw, max_position=MAX_POSITION, kv_heads=_KV_HEADS)
        attention = replace(attention, qkv_bias=bias)
        config = config_from_hf(raw, "Qwen2MoeForCausalLM", attention, max_position=MAX_POSITION)
        shared = hf_config.count(raw, "shared_expert_intermediate_size", default=_SHARED_SIZE)
        mixture = experts_from_hf(raw, num_experts=60, top_k=4, inner_size=1408)
        config = replace(config, experts=replace(mixture, shared_size=shared))
        return with_windows(raw, config, lambda layer, border: layer % 2 == 0 and layer < border)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map_of(config, partial(_of_layer, config))


def experts_from_hf(raw: Mapping[str, Any], *, num_experts: int, top_k: int, inner_size: int) -> ExpertsConfig:
    """The experts of a Qwen without a shared one; the keywords are what a config.json that is silent stands for."""
    layers = hf_config.count(raw, "num_hidden_layers")
    every = hf_config.count(raw, "decoder_sparse_step", default=1)
    plain = [] if raw.get("mlp_only_layers") is None else raw["mlp_only_layers"]
    if not isinstance(plain, list) or not all(type(layer) is int for layer in plain):
        raise ConfigError(f"mlp_only_layers {plain!r} is not a list of layers")
    return ExpertsConfig(
        num_experts=hf_config.count(raw, "num_local_experts", "num_experts", default=num_experts),
        top_k=hf_config.count(raw, "num_experts_per_tok", default=top_k),
        inner_size=hf_config.count(raw, "moe_intermediate_size", default=inner_size),
        normalized=hf_config.flag(raw, "norm_topk_prob", False),
        dense_layers=tuple(layer for layer in range(layers) if layer in plain or (layer + 1) % every),
    )


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    assert config.experts is not None
    yield from weights_before_mlp(config, layer)
    if layer in config.experts.dense_layers:
        yield from mlp_weights(config, layer, "")
        return
    name, hf = f"layers.{layer}.experts", f"layers.{layer}.mlp"
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    yield from experts(name, hf, (gate, up, down), config.experts.num_experts, stacked=hf)
    if config.experts.shared_size is None:
        return
    gate_up: dict[str, Axis] = {f"{hf}.shared_expert.{each}": "shared_inner" for each in (gate, up)}
    row: dict[str, Axis] = {f"{hf}.shared_expert.{down}": "hidden"}
    axes: tuple[Axis, ...] = ("one", "hidden")
    yield from linear(f"{name}.shared.gate_up", gate_up, "shared_gate_up", "hidden", Split.GATE_UP, bias=False)
    yield from linear(f"{name}.shared.down", row, "hidden", "shared_inner", Split.ROW, bias=False)
    scale = StoredTensor(f"{hf}.shared_expert_gate.weight", axes)
    yield WeightSpec(name=f"{name}.shared.scale", sources=(scale,), axes=axes)
