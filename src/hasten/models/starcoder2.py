"""StarCoder 2: GPT-2's block with rotary positions, grouped key/value heads and a sliding window.

Source: Lozhkov et al., "StarCoder 2 and The Stack v2: The Next Generation", 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.decoder_weights import BOTH_NORMS, decoder_weights, plain_layer, separate_qkv
from hasten.models.gpt2 import GPT2LMHeadModel
from hasten.models.llama import attention_from_hf
from hasten.models.weight_map import WeightMap, WeightSpec, norm

_MAX_POSITION = 4096


class Starcoder2ForCausalLM(GPT2LMHeadModel):
    """StarCoder 2 with its language model head."""

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        {"attention_dropout", "embedding_dropout", "initializer_range", "residual_dropout"}
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        for name, kind in (("mlp_type", "default"), ("norm_type", "layer_norm")):
            if raw.get(name) not in (None, kind):
                raise UnsupportedError(f"{name} {raw[name]!r} is not supported; supported is {kind}")
        bias = hf_config.flag(raw, "use_bias", True)
        attention = replace(
            attention_from_hf(raw, max_position=_MAX_POSITION, kv_heads=2),
            window=hf_config.optional_count(raw, "sliding_window", None),
            qkv_bias=bias,
            dense_bias=bias,
        )
        return ModelConfig(
            architecture="Starcoder2ForCausalLM",
            num_layers=hf_config.count(raw, "num_hidden_layers"),
            hidden_size=hf_config.count(raw, "hidden_size"),
            intermediate_size=hf_config.count(raw, "intermediate_size"),
            vocab_size=hf_config.count(raw, "vocab_size", default=49152),
            attention=attention,
            norm_eps=hf_config.fraction(raw, "norm_epsilon", 1e-5),
            activation=hf_config.activation(raw, "hidden_act", "gelu_pytorch_tanh"),
            mlp_bias=bias,
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=_MAX_POSITION),
            **hf_config.usual(raw, tied=True, bos=50256, eos=50256),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return decoder_weights(
            config,
            partial(_of_layer, config),
            prefix="model.",
            embedding="embed_tokens",
            last=norm("final_norm", "norm", bias=True),
            ignored=("layers.{layer}.self_attn.rotary_emb.inv_freq",),
        )


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"layers.{layer}",
        norms=BOTH_NORMS,
        qkv=separate_qkv("self_attn"),
        dense="self_attn.o_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        qkv_bias=config.attention.qkv_bias,
        dense_bias=config.attention.dense_bias,
        mlp_bias=config.mlp_bias,
    )
