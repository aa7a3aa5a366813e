"""SmolLM 3: LLaMA with layers without positions, every fourth where config.json does not say which.

Source: Hugging Face, "SmolLM3: smol, multilingual, long-context reasoner", 2025.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.errors import ConfigError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.llama import (
    FULL,
    SLIDING,
    LlamaForCausalLM,
    attention_from_hf,
    config_from_hf,
    layer_kinds,
)

_MAX_POSITION, _KV_HEADS, _THETA, _INTERVAL = 32_768, 4, 2e6, 4
_BOS, _EOS, _PAD = 128_000, 128_001, 128_004


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM 3 with its language model head."""

    # published checkpoints have them next to a `use_sliding_window` that is false
    hf_harmless: ClassVar[frozenset[str]] = LlamaForCausalLM.hf_harmless | {"sliding_window", "max_window_layers"}

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; with `use_sliding_window`, layers without positions have the window."""
        bias = hf_config.flag(raw, "attention_bias", False)
        attention = attention_from_hf(raw, max_position=_MAX_POSITION, kv_heads=_KV_HEADS, theta=_THETA)
        attention = replace(attention, qkv_bias=bias, dense_bias=bias)
        config = config_from_hf(raw, "SmolLM3ForCausalLM", attention, max_position=_MAX_POSITION, bos=_BOS, eos=_EOS)
        return replace(
            config,
            mlp_bias=hf_config.flag(raw, "mlp_bias", False),
            tie_word_embeddings=hf_config.flag(raw, "tie_word_embeddings", True),
            pad_token_id=hf_config.token(raw, "pad_token_id", _PAD),
            layer_attention=_layers(raw, attention, config.num_layers),
        )


def _layers(raw: Mapping[str, Any], attention: AttentionConfig, count: int) -> tuple[AttentionConfig, ...]:
    slides = hf_config.flag(raw, "use_sliding_window", False)
    window = hf_config.optional_count(raw, "sliding_window", None) if slides else None
    turns = _turns(raw, count)
    kinds = layer_kinds(raw, [FULL if each or window is None else SLIDING for each in turns])
    if SLIDING in kinds and window is None:
        raise ConfigError(f"layer_types has {SLIDING!r}, but use_sliding_window and sliding_window give no window")
    still = replace(attention, position="none", rope=None)
    return tuple(
        replace(attention if each else still, window=window if kind == SLIDING else None)
        for each, kind in zip(turns, kinds, strict=True)
    )


def _turns(raw: Mapping[str, Any], count: int) -> list[bool]:
    """Whether each layer has positions: `no_rope_layers` is 1 where it has them."""
    given = raw.get("no_rope_layers")
    every = hf_config.count(raw, "no_rope_layer_interval", default=_INTERVAL)
    if given is None:
        return [(layer + 1) % every != 0 for layer in range(count)]
    if not isinstance(given, list) or len(given) < count or any(each not in (0, 1) for each in given):
        raise ConfigError(f"no_rope_layers {given!r} is not a list of 0 or 1 for each of {count} layers")
    return [bool(each) for each in given[:count]]
