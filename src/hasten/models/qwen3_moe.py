"""Qwen 3 with mixtures of experts: Qwen 3's attention, many small experts, and none that sees every token.

Source: Qwen Team, "Qwen3 Technical Report", 2025.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.llama import attention_from_hf, config_from_hf
from hasten.models.qwen2 import MAX_POSITION
from hasten.models.qwen2_moe import Qwen2MoeForCausalLM, experts_from_hf

_KV_HEADS = 4


class Qwen3MoeForCausalLM(Qwen2MoeForCausalLM):
    """Qwen 3 with a mixture of experts and its language model head."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; all layers have a window, or none."""
        bias = hf_config.flag(raw, "attention_bias", False)
        slides = hf_config.flag(raw, "use_sliding_window", False)
        attention = replace(
            attention_from_hf(raw, max_position=MAX_POSITION, kv_heads=_KV_HEADS),
            qkv_bias=bias,
            dense_bias=bias,
            qk_norm="rms",
            window=hf_config.optional_count(raw, "sliding_window", 4096) if slides else None,
        )
        config = config_from_hf(raw, "Qwen3MoeForCausalLM", attention, max_position=MAX_POSITION)
        return replace(config, experts=experts_from_hf(raw, num_experts=128, top_k=8, inner_size=768))
