"""GPT-J: rotary positions of neighbouring dimensions; attention and MLP side by side, behind one norm.

Source: Wang, Komatsuzaki, "GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model", 2021.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.config import AttentionConfig, ModelConfig, RopeConfig
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.models import hf_config
from hasten.models.decoder import Decoder, ParallelBlock
from hasten.models.weight_map import (
    Axis,
    Tie,
    WeightMap,
    WeightSpec,
    linear,
    norm,
    vocabulary,
    vocabulary_bias,
)
from hasten.parallel.shard import Split


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
        hidden = hf_config.count(raw, "hidden_size", "n_embd")
        heads = hf_config.count(raw, "num_attention_heads", "n_head")
        if hidden % heads:
            raise ConfigError(f"n_embd {hidden} is not a multiple of n_head {heads}")
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
            tie_word_embeddings=hf_config.flag(raw, "tie_word_embeddings", False),
            dtype=hf_config.dtype(raw) or "fp32",
            bos_token_id=hf_config.token(raw, "bos_token_id", 50256),
            eos_token_ids=hf_config.tokens(raw, "eos_token_id", 50256),
            pad_token_id=hf_config.token(raw, "pad_token_id"),
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", "n_positions", default=2048),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return WeightMap(
            specs=tuple(_specs(config)),
            hf_prefix="transformer.",
            hf_unprefixed=frozenset({"lm_head.weight", "lm_head.bias"}),
            hf_ignored=("h.{layer}.attn.bias", "h.{layer}.attn.masked_bias"),
            head_tie=Tie(_HEAD, _EMBEDDING) if config.tie_word_embeddings else None,
        )


_EMBEDDING = vocabulary("embedding.weight", "wte.weight")
_HEAD = vocabulary("head.weight", "lm_head.weight")


def _of_layer(layer: int) -> Iterator[WeightSpec]:
    name, hf = f"layers.{layer}", f"h.{layer}"
    qkv: dict[str, Axis] = {f"{hf}.attn.q_proj": "query", f"{hf}.attn.k_proj": "kv", f"{hf}.attn.v_proj": "kv"}
    dense: dict[str, Axis] = {f"{hf}.attn.out_proj": "hidden"}
    up: dict[str, Axis] = {f"{hf}.mlp.fc_in": "inner"}
    down: dict[str, Axis] = {f"{hf}.mlp.fc_out": "hidden"}
    yield from norm(f"{name}.input_norm", f"{hf}.ln_1", bias=True)
    yield from linear(f"{name}.attention.qkv", qkv, "qkv", "hidden", Split.QKV, bias=False)
    yield from linear(f"{name}.attention.dense", dense, "hidden", "query", Split.ROW, bias=False)
    yield from linear(f"{name}.mlp.up", up, "inner", "hidden", Split.COLUMN, bias=True)
    yield from linear(f"{name}.mlp.down", down, "hidden", "inner", Split.ROW, bias=True)


def _specs(config: ModelConfig) -> Iterator[WeightSpec]:
    yield _EMBEDDING
    for layer in range(config.num_layers):
        yield from _of_layer(layer)
    yield from norm("final_norm", "ln_f", bias=True)
    if not config.tie_word_embeddings:
        yield _HEAD
    yield vocabulary_bias("head.bias", "lm_head.bias")
