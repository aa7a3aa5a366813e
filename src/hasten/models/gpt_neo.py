"""GPT-Neo: GPT-2 with layers that see a window and layers that see all, in turn, and scores that are not scaled.

Source: Black et al., "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow", 2021.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.decoder_weights import plain_layer, separate_qkv
from hasten.models.gpt2 import NORMS, GPT2LMHeadModel, weight_map
from hasten.models.weight_map import WeightMap, WeightSpec

_GLOBAL, _LOCAL = "global", "local"
_ALTERNATING = [[[_GLOBAL, _LOCAL], 12]]


class GPTNeoForCausalLM(GPT2LMHeadModel):
    """GPT-Neo with its language model head."""

    # transformers writes `attention_layers` next to `attention_types`, from which it follows
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        attention_dropout attention_layers classifier_dropout embed_dropout initializer_range resid_dropout
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        hidden, heads = hf_config.width_and_heads(raw, ("hidden_size",), ("num_heads",))
        kinds = _kinds(raw, hf_config.count(raw, "num_layers"))
        sees_all = AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_size=hidden // heads,
            position="learned",
            scale=1.0,
            qkv_bias=False,
        )
        sees_window = replace(sees_all, window=hf_config.count(raw, "window_size", default=256))
        return ModelConfig(
            architecture="GPTNeoForCausalLM",
            num_layers=len(kinds),
            hidden_size=hidden,
            intermediate_size=hf_config.count(raw, "intermediate_size", default=4 * hidden),
            vocab_size=hf_config.count(raw, "vocab_size", default=50257),
            attention=sees_all,
            layer_attention=tuple(sees_window if kind == _LOCAL else sees_all for kind in kinds),
            norm_eps=hf_config.fraction(raw, "layer_norm_epsilon", 1e-5),
            activation=hf_config.activation(raw, "activation_function", "gelu_new"),
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=2048),
            **hf_config.usual(raw, tied=True, bos=50256, eos=50256),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        leftovers = ("h.{layer}.attn.attention.bias", "h.{layer}.attn.attention.masked_bias")
        return replace(weight_map(config, _of_layer), hf_ignored=leftovers)


def _kinds(raw: Mapping[str, Any], count: int) -> Sequence[str]:
    """The kind of each layer, as `attention_types` repeats lists of them."""
    types: Any = _ALTERNATING if raw.get("attention_types") is None else raw["attention_types"]
    try:
        kinds = [kind for each, times in types for _ in range(times) for kind in each]
    except (TypeError, ValueError):
        raise ConfigError(f"attention_types {types!r} is not a list of kinds and how often they are repeated") from None
    if unknown := [kind for kind in kinds if kind not in (_GLOBAL, _LOCAL)]:
        raise UnsupportedError(f"attention_types has {unknown[0]!r}; supported are {_GLOBAL} and {_LOCAL}")
    if len(kinds) != count:
        raise ConfigError(f"attention_types has {len(kinds)} layers, num_layers is {count}")
    return kinds


def _of_layer(layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"h.{layer}",
        norms=NORMS,
        qkv=separate_qkv("attn.attention"),
        dense="attn.attention.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        qkv_bias=False,
    )
