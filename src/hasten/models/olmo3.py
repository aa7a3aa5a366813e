"""OLMo 3: OLMo 2 with a window in three of four layers, and a rope that is stretched in the other ones alone.

Source: OLMo Team, "Olmo 3", 2025.
"""

from collections.abc import Mapping
from typing import Any

from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.llama import FULL, SLIDING, layer_kinds, with_layers
from hasten.models.olmo2 import MAX_POSITION, Olmo2ForCausalLM, olmo_from_hf
from hasten.models.rope import rope_from_hf, rope_of_kind

_THETA, _WINDOW, _EVERY = 500_000.0, 4096, 4


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """OLMo 3 with its language model head."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; every fourth layer has no window unless `layer_types` says otherwise."""
        given = raw.get("rope_parameters") or {}
        nested = isinstance(given, Mapping) and (FULL in given or SLIDING in given)
        ropes = given if nested else {}
        theta = raw.get("rope_theta")
        of_full = {
            "rope_theta": theta,
            "rope_scaling": rope_of_kind({FULL: raw.get("rope_scaling")}, FULL),
            "rope_parameters": rope_of_kind(ropes, FULL) if nested else given,
        }
        of_sliding = {"rope_theta": theta, "rope_parameters": rope_of_kind(ropes, SLIDING)}
        config = olmo_from_hf(raw, "Olmo3ForCausalLM", rope_raw=of_full, theta=_THETA)
        kinds = layer_kinds(raw, [SLIDING if (layer + 1) % _EVERY else FULL for layer in range(config.num_layers)])
        longest = hf_config.count(raw, "max_position_embeddings", default=MAX_POSITION)
        rope = rope_from_hf(of_sliding, config.attention.head_size, longest, theta=_THETA)
        return with_layers(config, kinds, window=hf_config.count(raw, "sliding_window", default=_WINDOW), rope=rope)
