"""StarCoder 2: GPT-2's block with rotary positions, grouped key/value heads and a sliding window.

Source: Lozhkov et al., "StarCoder 2 and The Stack v2: The Next Generation", 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.config import ModelConfig
from hasten.core.errors import UnsupportedError
from hasten.models import hf_config
from hasten.models.gpt2 import GPT2LMHeadModel
from hasten.models.llama import attention_from_hf
from hasten.models.weight_map import Axis, Tie, WeightMap, WeightSpec, linear, norm, vocabulary
from hasten.parallel.shard import Split

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
            tie_word_embeddings=hf_config.flag(raw, "tie_word_embeddings", True),
            dtype=hf_config.dtype(raw) or "fp32",
            bos_token_id=hf_config.token(raw, "bos_token_id", 50256),
            eos_token_ids=hf_config.tokens(raw, "eos_token_id", 50256),
            pad_token_id=hf_config.token(raw, "pad_token_id"),
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=_MAX_POSITION),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return WeightMap(
            specs=tuple(_specs(config)),
            hf_prefix="model.",
            hf_unprefixed=frozenset({"lm_head.weight"}),
            hf_ignored=("layers.{layer}.self_attn.rotary_emb.inv_freq",),
            head_tie=Tie(_HEAD, _EMBEDDING) if config.tie_word_embeddings else None,
        )


_EMBEDDING = vocabulary("embedding.weight", "embed_tokens.weight")
_HEAD = vocabulary("head.weight", "lm_head.weight")


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    name = hf = f"layers.{layer}"
    attention, bias = config.attention, config.mlp_bias
    qkv: dict[str, Axis] = {f"{hf}.self_attn.q_proj": "query"}
    qkv |= {f"{hf}.self_attn.{each}_proj": "kv" for each in "kv"}
    dense: dict[str, Axis] = {f"{hf}.self_attn.o_proj": "hidden"}
    up: dict[str, Axis] = {f"{hf}.mlp.c_fc": "inner"}
    down: dict[str, Axis] = {f"{hf}.mlp.c_proj": "hidden"}
    yield from norm(f"{name}.input_norm", f"{hf}.input_layernorm", bias=True)
    yield from linear(f"{name}.attention.qkv", qkv, "qkv", "hidden", Split.QKV, bias=attention.qkv_bias)
    yield from linear(f"{name}.attention.dense", dense, "hidden", "query", Split.ROW, bias=attention.dense_bias)
    yield from norm(f"{name}.post_norm", f"{hf}.post_attention_layernorm", bias=True)
    yield from linear(f"{name}.mlp.up", up, "inner", "hidden", Split.COLUMN, bias=bias)
    yield from linear(f"{name}.mlp.down", down, "hidden", "inner", Split.ROW, bias=bias)


def _specs(config: ModelConfig) -> Iterator[WeightSpec]:
    yield _EMBEDDING
    for layer in range(config.num_layers):
        yield from _of_layer(config, layer)
    yield from norm("final_norm", "norm", bias=True)
    if not config.tie_word_embeddings:
        yield _HEAD
