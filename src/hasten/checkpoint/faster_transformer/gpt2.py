"""GPT-2 in FasterTransformer's format."""

from collections.abc import Mapping
from typing import ClassVar

from hasten.checkpoint.faster_transformer.family import LAYER_MODULES, Family, attention_of, size_keys, token_keys
from hasten.checkpoint.faster_transformer.ini import Section
from hasten.core.dtypes import DTypeName
from hasten.core.model_config import ModelConfig

_EPS = 1e-5
"""What GPT-2 was trained with. The converter writes no epsilon, and the runtime then takes 1e-6."""


class GPT2(Family):
    """As `huggingface_gpt_convert.py` writes it, and where that drops what the runtime reads (an MLP of another width
    than 4 x hidden, an untied head, another epsilon), as the runtime reads it.
    """

    architecture = "GPT2LMHeadModel"
    label = "GPT-2"
    section = "gpt"
    modules: ClassVar[Mapping[str, str]] = LAYER_MODULES | {"final_norm": "final_layernorm", "head": "lm_head"}
    parameters: ClassVar[Mapping[str, str]] = {"embedding.weight": "wte", "embedding.positions": "wpe"}
    fixed: ClassVar[Mapping[str, str]] = {
        "activation_type": "Gelu",
        "layernorm_type": "pre_layernorm",
        "has_positional_encoding": "True",
        "has_pre_decoder_layernorm": "False",
        "has_post_decoder_layernorm": "True",
        "use_attention_linear_bias": "False",
        "has_adapters": "False",
    }

    def why_not(self, config: ModelConfig) -> str | None:
        """What of a model FasterTransformer cannot compute."""
        if config.activation != "gelu_tanh":
            return f"activation {config.activation}"
        if config.layer_attention or config.attention.scale is not None:
            return "attention scores with a scale of their own"
        return None

    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of config.ini, in order."""
        eps = {} if config.norm_eps == _EPS else {"layernorm_eps": config.norm_eps}
        return {
            **size_keys(config, model_name),
            "max_pos_seq_len": config.max_position_embeddings,
            "num_layer": config.num_layers,
            "vocab_size": config.vocab_size,
            **token_keys(config),
            "weight_data_type": dtype,
            "tensor_para_size": ranks,
            **eps,
        }

    def config(self, section: Section) -> ModelConfig:
        """What config.ini describes."""
        return self.described(
            section,
            attention_of(section, position="learned"),
            tokens=(50256, 50256),
            norm_eps=section.number("layernorm_eps", _EPS),
            max_position_embeddings=section.count("max_pos_seq_len"),
        )
