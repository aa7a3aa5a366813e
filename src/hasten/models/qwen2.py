"""Qwen 2 and 2.5: LLaMA with biases of queries, keys and values, and a window in some layers where configured.

Source: Qwen Team, "Qwen2 Technical Report", 2024.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hasten.core.config import ModelConfig
from hasten.core.errors import ConfigError, UnsupportedError
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

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        if hf_config.flag(raw, "use_mrope", False):
            raise UnsupportedError("use_mrope: positions in several dimensions are not supported")
        attention = replace(attention_from_hf(raw, max_position=MAX_POSITION, kv_heads=KV_HEADS), qkv_bias=True)
        config = config_from_hf(raw, "Qwen2ForCausalLM", attention, max_position=MAX_POSITION)
        return with_windows(raw, config)


def with_windows(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The configuration with a sliding window in the layers that config.json says have one."""
    slides = hf_config.flag(raw, "use_sliding_window", False)
    window = hf_config.optional_count(raw, "sliding_window", 4096) if slides else None
    first = hf_config.optional_count(raw, "max_window_layers", 28) if raw.get("max_window_layers") != 0 else 0
    layers = range(config.num_layers)
    kinds = layer_kinds(raw, [SLIDING if window is not None and layer >= (first or 0) else FULL for layer in layers])
    if SLIDING not in kinds:
        return config
    if window is None:
        raise ConfigError(f"layer_types has {SLIDING!r}, but use_sliding_window and sliding_window give no window")
    return with_layers(config, kinds, window=window)
