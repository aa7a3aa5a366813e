"""Phi 1, 1.5 and 2: attention and MLP side by side, behind one norm; parts of heads turn; the head has a bias.

Source: Gunasekar et al., "Textbooks Are All You Need", 2023; Li et al., "Textbooks Are All You Need II: phi-1.5
technical report", 2023.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.decoder import Decoder, ParallelBlock
from hasten.models.decoder_weights import decoder_weights, plain_layer, separate_qkv
from hasten.models.llama import attention_from_hf
from hasten.models.weight_map import (
    WeightMap,
    WeightSpec,
    norm,
)

_MAX_POSITION = 2048


class PhiForCausalLM(Decoder):
    """Phi with its language model head, which has a bias."""

    block: ClassVar[type[nn.Module]] = ParallelBlock

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "attention_dropout embd_pdrop initializer_range resid_pdrop".split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with the rope under its keys of old and new versions."""
        attention = attention_from_hf(raw, max_position=_MAX_POSITION, partial=0.5)
        normed = hf_config.flag(raw, "qk_layernorm", False)
        return ModelConfig(
            architecture="PhiForCausalLM",
            num_layers=hf_config.count(raw, "num_hidden_layers"),
            hidden_size=hf_config.count(raw, "hidden_size"),
            intermediate_size=hf_config.count(raw, "intermediate_size"),
            vocab_size=hf_config.count(raw, "vocab_size"),
            attention=replace(attention, qkv_bias=True, dense_bias=True, qk_norm="layer" if normed else None),
            norm_eps=hf_config.fraction(raw, "layer_norm_eps", 1e-5),
            activation=hf_config.activation(raw, "hidden_act", "gelu_new"),
            head_bias=True,
            parallel_residual=True,
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=_MAX_POSITION),
            **hf_config.usual(raw, tied=False, bos=1, eos=2),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return decoder_weights(
            config,
            partial(_of_layer, config),
            prefix="model.",
            embedding="embed_tokens",
            last=norm("final_norm", "final_layernorm", bias=True),
            ignored=("layers.{layer}.self_attn.rotary_emb.inv_freq",),
        )


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    name, attention = f"layers.{layer}", f"layers.{layer}.self_attn"
    yield from plain_layer(
        layer,
        name,
        norms={"input_norm": "input_layernorm"},
        qkv=separate_qkv("self_attn"),
        dense="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
    )
    if config.attention.qk_norm:
        yield from norm(f"{name}.attention.query_norm", f"{attention}.q_layernorm", bias=True, axis="head")
        yield from norm(f"{name}.attention.key_norm", f"{attention}.k_layernorm", bias=True, axis="head")
