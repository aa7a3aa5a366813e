"""Seed-OSS: LLaMA with biases of queries, keys and values, and a head size of its own.

Source: ByteDance Seed Team, "Seed-OSS Open-Source Models", 2025.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.llama import LlamaForCausalLM, attention_from_hf, config_from_hf

_MAX_POSITION, _KV_HEADS, _HEAD_SIZE = 524_288, 8, 128


class SeedOssForCausalLM(LlamaForCausalLM):
    """Seed-OSS with its language model head."""

    hf_harmless: ClassVar[frozenset[str]] = LlamaForCausalLM.hf_harmless | {"residual_dropout"}

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        attention = replace(
            attention_from_hf(raw, max_position=_MAX_POSITION, kv_heads=_KV_HEADS, head_size=_HEAD_SIZE),
            qkv_bias=hf_config.flag(raw, "attention_bias", True),
            dense_bias=hf_config.flag(raw, "attention_out_bias", False),
        )
        config = config_from_hf(raw, "SeedOssForCausalLM", attention, max_position=_MAX_POSITION, bos=0, eos=2)
        return replace(
            config,
            mlp_bias=hf_config.flag(raw, "mlp_bias", False),
            pad_token_id=hf_config.token(raw, "pad_token_id", 1),
        )
