"""GPT-BigCode, which StarCoder 1 and SantaCoder are: GPT-2 with one key/value head for all queries, or one for each.

Source: Ben Allal et al., "SantaCoder: don't reach for the stars!", 2023; Li et al., "StarCoder: may the source be with
you!", 2023; Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019 (multi-query attention).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.gpt2 import GPT2LMHeadModel, config_from_hf, of_layer, weight_map
from hasten.models.weight_map import HEAD_MAJOR, SAME, WeightMap


class GPTBigCodeForCausalLM(GPT2LMHeadModel):
    """GPT-BigCode with its language model head."""

    hf_harmless: ClassVar[frozenset[str]] = GPT2LMHeadModel.hf_harmless | frozenset(
        """
        attention_softmax_in_fp32 inference_runner max_batch_size max_sequence_length num_key_value_heads
        pad_key_length pre_allocate_kv_cache scale_attention_softmax_in_fp32 validate_runner_input
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        config = config_from_hf(raw, "GPTBigCodeForCausalLM", "gelu_pytorch_tanh")
        if not hf_config.flag(raw, "multi_query", True):
            return config
        return replace(config, attention=replace(config.attention, num_kv_heads=1))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights.

        The fused projection is all queries, the key and the value; or query, key and value of each head in turn.
        """
        layout = SAME if config.attention.num_kv_heads == 1 else HEAD_MAJOR
        return weight_map(config, lambda layer: of_layer(layer, qkv_layout=layout))
