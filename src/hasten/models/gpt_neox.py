"""GPT-NeoX and Pythia: rotary positions of a part of each head; attention and MLP side by side, behind two norms.

Source: Black et al., "GPT-NeoX-20B: An Open-Source Autoregressive Language Model", 2022.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.decoder import Decoder, SequentialBlock, TwinNormBlock
from hasten.models.decoder_weights import BOTH_NORMS, decoder_weights, plain_layer
from hasten.models.rope import rope_from_hf
from hasten.models.weight_map import HEAD_MAJOR, WeightMap, WeightSpec, norm
from hasten.parallel.groups import ParallelGroups

_MAX_POSITION = 2048


class GPTNeoXForCausalLM(Decoder):
    """GPT-NeoX with its language model head."""

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """Attention and MLP of the same hidden states, each behind a norm of its own, or one after the other."""
        block = TwinNormBlock if config.parallel_residual else SequentialBlock
        return block(config, layer, groups)

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        attention_dropout attention_probs_dropout_prob classifier_dropout hidden_dropout hidden_dropout_prob
        initializer_range
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with the rope under its keys of old and new versions."""
        hidden, heads = hf_config.width_and_heads(raw, ("hidden_size",), ("num_attention_heads",))
        longest = hf_config.count(raw, "max_position_embeddings", default=_MAX_POSITION)
        bias = hf_config.flag(raw, "attention_bias", True)
        return ModelConfig(
            architecture="GPTNeoXForCausalLM",
            num_layers=hf_config.count(raw, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=hf_config.count(raw, "intermediate_size"),
            vocab_size=hf_config.count(raw, "vocab_size"),
            attention=AttentionConfig(
                num_heads=heads,
                num_kv_heads=heads,
                head_size=hidden // heads,
                position="rope",
                rope=rope_from_hf(
                    raw,
                    hidden // heads,
                    longest,
                    theta=hf_config.number(raw, "rotary_emb_base", 1e4),
                    partial=hf_config.number(raw, "rotary_pct", 0.25),
                ),
                qkv_bias=bias,
                dense_bias=bias,
            ),
            norm_eps=hf_config.fraction(raw, "layer_norm_eps", 1e-5),
            activation=hf_config.activation(raw, "hidden_act", "gelu"),
            parallel_residual=hf_config.flag(raw, "use_parallel_residual", True),
            max_position_embeddings=longest,
            **hf_config.usual(raw, tied=False, bos=0, eos=2),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return decoder_weights(
            config,
            partial(_of_layer, config),
            prefix="gpt_neox.",
            embedding="embed_in",
            last=norm("final_norm", "final_layer_norm", bias=True),
            head="embed_out",
            ignored=(
                "layers.{layer}.attention.bias",
                "layers.{layer}.attention.masked_bias",
                "layers.{layer}.attention.rotary_emb.inv_freq",
            ),
        )


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"layers.{layer}",
        norms=BOTH_NORMS,
        qkv={"attention.query_key_value": "qkv"},
        dense="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        qkv_bias=config.attention.qkv_bias,
        dense_bias=config.attention.qkv_bias,
        qkv_layout=HEAD_MAJOR,
    )
