"""Qwen 3, dense: LLaMA with a norm of each query and key head, and a head size of its own.

Source: Qwen Team, "Qwen3 Technical Report", 2025.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.llama import LlamaForCausalLM, attention_from_hf, config_from_hf
from hasten.models.qwen2 import KV_HEADS, MAX_POSITION, Qwen2ForCausalLM, with_windows


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen 3 with its language model head."""

    hf_harmless: ClassVar[frozenset[str]] = Qwen2ForCausalLM.hf_harmless

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        bias = hf_config.flag(raw, "attention_bias", False)
        attention = attention_from_hf(raw, max_position=MAX_POSITION, kv_heads=KV_HEADS, head_size=128)
        attention = replace(attention, qkv_bias=bias, dense_bias=bias, qk_norm="rms")
        config = config_from_hf(raw, "Qwen3ForCausalLM", attention, max_position=MAX_POSITION)
        return with_windows(raw, config)
