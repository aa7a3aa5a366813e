"""BLOOM in FasterTransformer's format."""

from collections.abc import Mapping
from typing import ClassVar

from hasten.checkpoint.faster_transformer.family import LAYER_MODULES, LAYERNORM_TYPES, Family, attention_of, token_keys
from hasten.checkpoint.faster_transformer.ini import Section
from hasten.core.dtypes import DTypeName
from hasten.core.model_config import ModelConfig


class Bloom(Family):
    """As `huggingface_bloom_convert.py` writes it, but for an untied head, which the runtime reads as
    (vocabulary, hidden).
    """

    architecture = "BloomForCausalLM"
    label = "BLOOM"
    section = "gpt"
    modules: ClassVar[Mapping[str, str]] = LAYER_MODULES | {
        "embedding_norm": "pre_decoder_layernorm",
        "final_norm": "final_layernorm",
        "head": "lm_head",
    }
    marks: ClassVar[Mapping[str, str]] = {"use_attention_linear_bias": "True"}
    fixed: ClassVar[Mapping[str, str]] = {
        **marks,
        "activation_type": "Gelu",
        "has_positional_encoding": "False",
        "has_pre_decoder_layernorm": "True",
        "has_post_decoder_layernorm": "True",
    }
    harmless = frozenset({"model_variant"})
    transposed_head = True

    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of config.ini, in order."""
        residual = "post" if config.residual_after_norm else "pre"
        return {
            "model_name": model_name,
            "num_layer": config.num_layers,
            "head_num": config.attention.num_heads,
            "inter_size": config.intermediate_size,
            "size_per_head": config.attention.head_size,
            "vocab_size": config.vocab_size,
            "tensor_para_size": ranks,
            "weight_data_type": dtype,
            "model_variant": f"bloom-{residual}",
            "layernorm_eps": config.norm_eps,
            "layernorm_type": f"{residual}_layernorm",
            "activation_type": "Gelu",
            "has_positional_encoding": False,
            "has_pre_decoder_layernorm": True,
            "has_post_decoder_layernorm": True,
            "use_attention_linear_bias": True,
            **token_keys(config),
        }

    def config(self, section: Section) -> ModelConfig:
        """What config.ini describes."""
        return self.described(
            section,
            attention_of(section),
            tokens=(1, 2),
            norm_eps=section.number("layernorm_eps", 1e-5),
            residual_after_norm=section.choice("layernorm_type", LAYERNORM_TYPES) == "post_layernorm",
        )
