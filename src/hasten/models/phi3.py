"""Phi 3, 3.5 and 4-mini: LLaMA with fused projections in its checkpoints, and parts of heads that turn.

Source: Abdin et al., "Phi-3 Technical Report", 2024.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.llama import LlamaForCausalLM, attention_from_hf, config_from_hf, weight_map
from hasten.models.rope import ROPE_ALIASES
from hasten.models.weight_map import WeightMap

_MAX_POSITION, _EOS, _EPS = 4096, 32_000, 1e-5


class Phi3ForCausalLM(LlamaForCausalLM):
    """Phi 3 with its language model head."""

    hf_harmless: ClassVar[frozenset[str]] = LlamaForCausalLM.hf_harmless | {"resid_pdrop", "embd_pdrop"}

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, in which `yarn` is an old name of `longrope`."""
        aliases = {**ROPE_ALIASES, "yarn": "longrope"}
        attention = attention_from_hf(raw, max_position=_MAX_POSITION, rope_aliases=aliases, partial=1.0)
        attention = replace(attention, window=hf_config.optional_count(raw, "sliding_window", None))
        config = config_from_hf(raw, "Phi3ForCausalLM", attention, max_position=_MAX_POSITION, bos=1, eos=_EOS)
        config = replace(config, norm_eps=hf_config.fraction(raw, "rms_norm_eps", _EPS))
        return replace(config, pad_token_id=hf_config.token(raw, "pad_token_id", _EOS))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map(config, fused=True)
