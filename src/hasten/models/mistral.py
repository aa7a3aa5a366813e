"""Mistral: LLaMA with a sliding window in every layer. Source: Jiang et al., "Mistral 7B", 2023."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.llama import LlamaForCausalLM, attention_from_hf, config_from_hf

_MAX_POSITION = 131_072


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral with its language model head."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; without `sliding_window` there is one of 4096 tokens, with null none."""
        attention = attention_from_hf(raw, max_position=_MAX_POSITION, kv_heads=8)
        attention = replace(attention, window=hf_config.optional_count(raw, "sliding_window", 4096))
        return config_from_hf(raw, "MistralForCausalLM", attention, max_position=_MAX_POSITION, bos=1, eos=2)
