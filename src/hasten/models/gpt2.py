"""GPT-2: layer norms before each part, learned positions, plain MLP, linear layers stored as (in, out).

Shapes: t tokens of the flat batch, h hidden.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.decoder import Decoder, SequentialBlock
from hasten.models.decoder_weights import decoder_weights, plain_layer
from hasten.models.weight_map import (
    SAME,
    TRANSPOSED,
    Layout,
    WeightMap,
    WeightSpec,
    norm,
    positions,
)


class GPT2LMHeadModel(Decoder):
    """GPT-2 with its language model head; families of the same build differ in their configuration and weights."""

    block: ClassVar[type[nn.Module]] = SequentialBlock
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        attn_pdrop embd_pdrop initializer_range n_ctx predict_special_tokens reorder_and_upcast_attn resid_pdrop
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        config = config_from_hf(raw, "GPT2LMHeadModel", "gelu_new")
        if not hf_config.flag(raw, "scale_attn_by_inverse_layer_idx", False):
            return config
        size, scale = config.attention.head_size, config.attention.scale
        whole = size**-0.5 if scale is None else scale
        layers = (replace(config.attention, scale=whole / (layer + 1)) for layer in range(config.num_layers))
        return replace(config, layer_attention=tuple(layers))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map(config, lambda layer: of_layer(layer, layout=TRANSPOSED))


def config_from_hf(raw: Mapping[str, Any], architecture: str, activation: str) -> ModelConfig:
    """All that families with GPT-2's keys have in common; `activation` is what a silent config.json stands for."""
    hidden, heads = hf_config.width_and_heads(raw, ("n_embd",), ("n_head",))
    scaled = hf_config.flag(raw, "scale_attn_weights", True)
    return ModelConfig(
        architecture=architecture,
        num_layers=hf_config.count(raw, "n_layer"),
        hidden_size=hidden,
        intermediate_size=hf_config.count(raw, "n_inner", default=4 * hidden),
        vocab_size=hf_config.count(raw, "vocab_size", default=50257),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_size=hidden // heads,
            position="learned",
            scale=None if scaled else 1.0,
        ),
        norm_eps=hf_config.fraction(raw, "layer_norm_epsilon", 1e-5),
        activation=hf_config.activation(raw, "activation_function", activation),
        max_position_embeddings=hf_config.count(raw, "n_positions", default=1024),
        **hf_config.usual(raw, tied=True, bos=50256, eos=50256),
    )


NORMS: Mapping[str, str] = {"input_norm": "ln_1", "post_norm": "ln_2"}
"""The norms of a layer: the module's names and the checkpoint's."""


def of_layer(layer: int, *, layout: Layout = SAME, qkv_layout: Layout | None = None) -> Iterator[WeightSpec]:
    """The weights of a layer under GPT-2's names; the fused projection may have a `qkv_layout` of its own."""
    return plain_layer(
        layer,
        f"h.{layer}",
        norms=NORMS,
        qkv={"attn.c_attn": "qkv"},
        dense="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        layout=layout,
        qkv_layout=qkv_layout,
    )


def weight_map(config: ModelConfig, layers: Callable[[int], Iterator[WeightSpec]]) -> WeightMap:
    """That of a model whose weights around the layers have GPT-2's names."""
    return decoder_weights(
        config,
        layers,
        prefix="transformer.",
        embedding="wte",
        first=(positions("embedding.positions", "wpe.weight"),),
        last=norm("final_norm", "ln_f", bias=True),
        ignored=("h.{layer}.attn.bias", "h.{layer}.attn.masked_bias"),
    )
