"""StableLM: LLaMA's attention and gated MLP between layer norms, side by side or not; parts of heads turn.

Source: Bellagente et al., "Stable LM 2 1.6B Technical Report", 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.model_config import ModelConfig
from hasten.layers.mlp import GatedMLP
from hasten.models import hf_config
from hasten.models.decoder import Decoder, ParallelBlock, SequentialBlock
from hasten.models.llama import attention_from_hf, attention_weights, config_from_hf, mlp_weights, weight_map_of
from hasten.models.weight_map import Axis, StoredTensor, WeightMap, WeightSpec, norm
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split

_MAX_POSITION = 4096


class StableLmBlock(SequentialBlock):
    """Attention, then a gated MLP."""

    mlp_kind = GatedMLP


class ParallelStableLmBlock(ParallelBlock):
    """Attention and a gated MLP side by side."""

    mlp_kind = GatedMLP


class StableLmForCausalLM(Decoder):
    """StableLM with its language model head."""

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """One layer, by its number."""
        block = ParallelStableLmBlock if config.parallel_residual else StableLmBlock
        return block(config, layer, groups)

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "attention_dropout hidden_dropout initializer_range rotary_scaling_factor".split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with the rope under its keys of old and new versions."""
        attention = attention_from_hf(raw, max_position=_MAX_POSITION, kv_heads=32, partial=0.25)
        normed = hf_config.flag(raw, "qk_layernorm", False)
        attention = replace(
            attention,
            qkv_bias=hf_config.flag(raw, "use_qkv_bias", False),
            qk_norm="layer_by_head" if normed else None,
        )
        config = config_from_hf(raw, "StableLmForCausalLM", attention, max_position=_MAX_POSITION, bos=0, eos=0)
        return replace(
            config,
            norm_eps=hf_config.fraction(raw, "layer_norm_eps", 1e-5),
            parallel_residual=hf_config.flag(raw, "use_parallel_residual", False),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map_of(config, lambda layer: _of_layer(config, layer), norm_bias=True)


def _head_norm(name: str, hf: str, axis: Axis, heads: int, split: Split) -> WeightSpec:
    """The weights of a norm of each head, which lie in a tensor of its own."""
    sources = tuple(StoredTensor(f"{hf}.norms.{head}.weight", ("head",)) for head in range(heads))
    return WeightSpec(name=f"{name}.weight", sources=sources, axes=(axis,), split=split, init="ones")


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    name, attention = f"layers.{layer}", config.attention
    yield from norm(f"{name}.input_norm", f"{name}.input_layernorm", bias=True)
    yield from attention_weights(config, layer)
    if attention.qk_norm:
        ours, theirs = f"{name}.attention", f"{name}.self_attn"
        queries, keys = attention.num_heads, attention.num_kv_heads
        yield _head_norm(f"{ours}.query_norm", f"{theirs}.q_layernorm", "query", queries, Split.COLUMN)
        yield _head_norm(f"{ours}.key_norm", f"{theirs}.k_layernorm", "kv", keys, Split.KV)
    if not config.parallel_residual:
        yield from norm(f"{name}.post_norm", f"{name}.post_attention_layernorm", bias=True)
    yield from mlp_weights(config, layer, "mlp.")
