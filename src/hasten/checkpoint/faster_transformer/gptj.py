"""GPT-J in FasterTransformer's format."""

from collections.abc import Mapping
from typing import Any, ClassVar

from hasten.checkpoint.faster_transformer.family import LAYER_MODULES, Family, attention_of, size_keys, token_keys
from hasten.checkpoint.faster_transformer.ini import Section
from hasten.core.dtypes import DTypeName
from hasten.core.model_config import ModelConfig, RopeConfig

_EPS = 1e-5
"""What GPT-J was trained with. The runtime takes 1e-6, whatever the model's."""


class GPTJ(Family):
    """As `huggingface_gptj_ckpt_convert.py` writes it, in other types than fp32 as well, and with the model's own inner
    size, which the runtime reads.
    """

    architecture = "GPTJForCausalLM"
    label = "GPT-J"
    section = "gptj"
    modules: ClassVar[Mapping[str, str]] = LAYER_MODULES | {"final_norm": "final_layernorm", "head": "lm_head"}
    always_head = True

    def name(self, given: str, raw: Mapping[str, Any]) -> str:
        """What config.json calls the model."""
        return str(raw.get("_name_or_path") or "gptj")

    def why_not(self, config: ModelConfig) -> str | None:
        """What of a model FasterTransformer cannot compute."""
        if config.activation != "gelu_tanh":
            return f"activation {config.activation}"
        return None if config.norm_eps == _EPS else f"epsilon {config.norm_eps}"

    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of config.ini, in order."""
        assert config.attention.rope is not None
        return {
            **size_keys(config, model_name),
            "num_layer": config.num_layers,
            "rotary_embedding": config.attention.rope.width,
            "vocab_size": config.vocab_size,
            **token_keys(config),
            "weight_data_type": dtype,
        }

    def config(self, section: Section) -> ModelConfig:
        """What config.ini describes."""
        rope = RopeConfig(width=section.count("rotary_embedding"), interleaved=True)
        return self.described(
            section,
            attention_of(section, position="rope", rope=rope, qkv_bias=False, dense_bias=False),
            tokens=(50256, 50256),
            norm_eps=_EPS,
            head_bias=True,
            parallel_residual=True,
            tie_word_embeddings=False,
        )
