"""GPT-J: rotary positions of neighbouring dimensions; attention and MLP side by side, behind one norm.

Source: Wang, Komatsuzaki, "GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model", 2021.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig, RopeConfig
from hasten.models import hf_config
from hasten.models.decoder import Decoder, ParallelBlock
from hasten.models.decoder_weights import decoder_weights, plain_layer, separate_qkv
from hasten.models.weight_map import (
    WeightMap,
    WeightSpec,
    norm,
)


class GPTJForCausalLM(Decoder):
    """GPT-J with its language model head, which has a bias."""

    block: ClassVar[type[nn.Module]] = ParallelBlock

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        attn_pdrop embd_pdrop initializer_range resid_pdrop rotary scale_attn_weights
        summary_activation
        summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        hidden, heads = hf_config.width_and_heads(raw, ("hidden_size", "n_embd"), ("num_attention_heads", "n_head"))
        if "rotary_dim" in raw and raw["rotary_dim"] is None:
            raise UnsupportedError("rotary_dim null is not supported; transformers rotates heads wrongly without it")
        return ModelConfig(
            architecture="GPTJForCausalLM",
            num_layers=hf_config.count(raw, "num_hidden_layers", "n_layer"),
            hidden_size=hidden,
            intermediate_size=hf_config.count(raw, "n_inner", default=4 * hidden),
            vocab_size=hf_config.count(raw, "vocab_size", default=50400),
            attention=AttentionConfig(
                num_heads=heads,
                num_kv_heads=heads,
                head_size=hidden // heads,
                position="rope",
                rope=RopeConfig(width=hf_config.count(raw, "rotary_dim", default=64), interleaved=True),
                qkv_bias=False,
                dense_bias=False,
            ),
            norm_eps=hf_config.fraction(raw, "layer_norm_epsilon", 1e-5),
            activation=hf_config.activation(raw, "activation_function", "gelu_new"),
            head_bias=True,
            parallel_residual=True,
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", "n_positions", default=2048),
            **hf_config.usual(raw, tied=False, bos=50256, eos=50256),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return decoder_weights(
            config,
            _of_layer,
            prefix="transformer.",
            embedding="wte",
            last=norm("final_norm", "ln_f", bias=True),
            ignored=("h.{layer}.attn.bias", "h.{layer}.attn.masked_bias"),
        )


def _of_layer(layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"h.{layer}",
        norms={"input_norm": "ln_1"},
        qkv=separate_qkv("attn"),
        dense="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        qkv_bias=False,
        dense_bias=False,
    )
