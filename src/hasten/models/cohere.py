"""Command R, R+ and R7B of Cohere: attention and gated MLP side by side, behind one norm without bias.

Neighbouring dimensions of heads turn, and logits are scaled. Command R7B (Cohere 2) has windows in three of four
layers, and positions in those alone.
Sources: Cohere, "Command R", 2024; Cohere, "Command A: An Enterprise-Ready Large Language Model", 2025.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.layers.mlp import GatedMLP
from hasten.models import hf_config
from hasten.models.decoder import Decoder, ParallelBlock
from hasten.models.llama import (
    FULL,
    SLIDING,
    attention_from_hf,
    attention_weights,
    config_from_hf,
    layer_kinds,
    mlp_weights,
    weight_map_of,
)
from hasten.models.weight_map import Axis, Layout, StoredTensor, WeightMap, WeightSpec, norm
from hasten.parallel.shard import Split

_MAX_POSITION, _WINDOW = 8192, 4096


class CohereBlock(ParallelBlock):
    """Attention and a gated MLP side by side."""

    mlp_kind = GatedMLP


class CohereForCausalLM(Decoder):
    """Command R with its language model head."""

    block: ClassVar[type[nn.Module]] = CohereBlock

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        attention_dropout initializer_range pretraining_tp use_embedding_sharing use_gated_activation
        use_parallel_block use_parallel_embedding
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with the rope under its keys of old and new versions."""
        normed = hf_config.flag(raw, "use_qk_norm", False)
        return _config(raw, "CohereForCausalLM", theta=500_000.0, qk_norm="layer_by_head" if normed else None)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map_of(config, lambda layer: _of_layer(config, layer))


class Cohere2ForCausalLM(CohereForCausalLM):
    """Command R7B and Command A with their language model head."""

    # transformers writes it next to `layer_types`, which it stands for
    hf_harmless: ClassVar[frozenset[str]] = CohereForCausalLM.hf_harmless | frozenset(
        "_sliding_window_pattern cache_implementation order_of_interleaved_layers rotary_pct".split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; every fourth layer has neither a window nor positions."""
        if hf_config.flag(raw, "use_qk_norm", False):
            raise UnsupportedError("use_qk_norm is not supported in Cohere 2")
        if raw.get("position_embedding_type") not in (None, "rope_gptj"):
            raise UnsupportedError(f"position_embedding_type {raw['position_embedding_type']!r} is not supported")
        config = _config(raw, "Cohere2ForCausalLM", theta=10_000.0)
        every = hf_config.count(raw, "layer_switch", "sliding_window_pattern", default=4)
        kinds = layer_kinds(raw, [SLIDING if (layer + 1) % every else FULL for layer in range(config.num_layers)])
        by_kind = {
            SLIDING: replace(config.attention, window=hf_config.optional_count(raw, "sliding_window", _WINDOW)),
            FULL: replace(config.attention, position="none", rope=None),
        }
        return replace(config, layer_attention=tuple(by_kind[kind] for kind in kinds))


def _config(raw: Mapping[str, Any], architecture: str, *, theta: float, **attention: Any) -> ModelConfig:
    bias = hf_config.flag(raw, "attention_bias", False)
    whole = attention_from_hf(raw, max_position=_MAX_POSITION, theta=theta, interleaved=True)
    whole = replace(whole, qkv_bias=bias, dense_bias=bias, **attention)
    config = config_from_hf(raw, architecture, whole, max_position=_MAX_POSITION, bos=5, eos=255_001)
    return replace(
        config,
        norm_eps=hf_config.fraction(raw, "layer_norm_eps", 1e-5),
        norm_bias=False,
        logit_scale=hf_config.number(raw, "logit_scale", 0.0625),
        parallel_residual=True,
        tie_word_embeddings=hf_config.flag(raw, "tie_word_embeddings", True),
        pad_token_id=hf_config.token(raw, "pad_token_id", 0),
        # Command R was trained for more than the length that its rope is described by
        max_position_embeddings=hf_config.count(
            raw, "model_max_length", "max_position_embeddings", default=_MAX_POSITION
        ),
    )


_FLAT = Layout(lambda tensor, _: tensor.flatten())
"""Weights of each head, stored as (heads, head size)."""


def _head_norm(name: str, hf: str, axis: Axis, heads: Axis, split: Split) -> WeightSpec:
    source = StoredTensor(f"{hf}.weight", (heads, "head"), _FLAT)
    return WeightSpec(name=f"{name}.weight", sources=(source,), axes=(axis,), split=split, init="ones")


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    name = f"layers.{layer}"
    yield from norm(f"{name}.input_norm", f"{name}.input_layernorm", bias=False)
    yield from attention_weights(config, layer)
    if config.attention.qk_norm:
        ours, theirs = f"{name}.attention", f"{name}.self_attn"
        yield _head_norm(f"{ours}.query_norm", f"{theirs}.q_norm", "query", "heads", Split.COLUMN)
        yield _head_norm(f"{ours}.key_norm", f"{theirs}.k_norm", "kv", "kv_heads", Split.KV)
    yield from mlp_weights(config, layer, "mlp.")
