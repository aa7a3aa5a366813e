"""Qwen 2 and 2.5: LLaMA with biases of queries, keys and values, and a window in some layers where configured.

Source: Qwen Team, "Qwen2 Technical Report", 2024.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.llama import (
    FULL,
    SLIDING,
    LlamaForCausalLM,
    attention_from_hf,
    config_from_hf,
    layer_kinds,
    with_layers,
)

MAX_POSITION, KV_HEADS = 32_768, 32


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen 2 with its language model head."""

    # published checkpoints have them, and a `use_sliding_window` that is false
    hf_harmless: ClassVar[frozenset[str]] = LlamaForCausalLM.hf_harmless | {"sliding_window", "max_window_layers"}

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        if hf_config.flag(raw, "use_mrope", False):
            raise UnsupportedError("use_mrope: positions in several dimensions are not supported")
        attention = replace(attention_from_hf(raw, max_position=MAX_POSITION, kv_heads=KV_HEADS), qkv_bias=True)
        config = config_from_hf(raw, "Qwen2ForCausalLM", attention, max_position=MAX_POSITION)
        return with_windows(raw, config)


def with_windows(
    raw: Mapping[str, Any], config: ModelConfig, chosen: Callable[[int, int], bool] = operator.ge
) -> ModelConfig:
    """The configuration with a sliding window in the layers that config.json says have one.

    `chosen(layer, max_window_layers)`: whether a layer has one where there is no `layer_types`.
    """
    slides = hf_config.flag(raw, "use_sliding_window", False)
    window = hf_config.optional_count(raw, "sliding_window", 4096) if slides else None
    border = hf_config.optional_count(raw, "max_window_layers", 28) if raw.get("max_window_layers") != 0 else 0
    slide = [window is not None and chosen(layer, border or 0) for layer in range(config.num_layers)]
    kinds = layer_kinds(raw, [SLIDING if each else FULL for each in slide])
    if SLIDING not in kinds:
        return config
    if window is None:
        raise ConfigError(f"layer_types has {SLIDING!r}, but use_sliding_window and sliding_window give no window")
    return with_layers(config, kinds, window=window)
