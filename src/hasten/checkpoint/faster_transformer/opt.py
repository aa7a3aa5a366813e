"""OPT in FasterTransformer's format."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hasten.checkpoint.faster_transformer.family import (
    LAYER_MODULES,
    LAYERNORM_TYPES,
    Derive,
    Family,
    FileTensor,
    Shards,
    attention_of,
    size_keys,
    token_keys,
)
from hasten.checkpoint.faster_transformer.ini import Section
from hasten.core.dtypes import DTypeName
from hasten.core.model_config import ModelConfig
from hasten.models.weight_map import WeightSpec

_POSITION_OFFSET = 2
_EPS = "1e-5"
"""Of every OPT, as the converter writes it."""
_PROJECTIONS = ("embedding.projection.weight", "project_out.weight")
"""From and to narrow embeddings."""


class OPT(Family):
    """As `huggingface_opt_convert.py` writes it, and an untied head as the runtime reads it.

    The head's file is always there. Both it and the embedding's have the projections of narrow embeddings (350m)
    multiplied in, so that what is read has none, and a head of its own.
    """

    architecture = "OPTForCausalLM"
    label = "OPT"
    section = "gpt"
    modules: ClassVar[Mapping[str, str]] = {
        **LAYER_MODULES,
        "final_norm": "final_layernorm",
        "head": "lm_head",
    }
    parameters: ClassVar[Mapping[str, str]] = {"embedding.weight": "wte", "embedding.positions": "wpe"}
    marks: ClassVar[Mapping[str, str]] = {"activation_type": "Relu"}
    fixed: ClassVar[Mapping[str, str]] = {
        **marks,
        "has_positional_encoding": "True",
        "has_pre_decoder_layernorm": "False",
        "use_attention_linear_bias": "False",
        "has_adapters": "False",
    }
    harmless = frozenset({"int8", "model_variant"})
    always_head = True

    def why_not(self, config: ModelConfig) -> str | None:
        """What of a model FasterTransformer cannot compute."""
        if config.activation != "relu":
            return f"activation {config.activation}"
        return None if config.mlp_bias and config.attention.qkv_bias else "linear layers without biases"

    def stored(self, config: ModelConfig) -> ModelConfig:
        """A model of transformers as the files hold it: without projections of narrow embeddings."""
        if config.embedding_size is None:
            return config
        return replace(config, embedding_size=None, tie_word_embeddings=False)

    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of config.ini, in order."""
        return {
            **size_keys(config, model_name),
            "max_pos_seq_len": config.max_position_embeddings,
            "num_layer": config.num_layers,
            "layernorm_eps": _EPS,
            "layernorm_type": "pre_layernorm" if config.norm_first else "post_layernorm",
            "activation_type": "Relu",
            "has_post_decoder_layernorm": int(config.final_norm),
            "vocab_size": config.vocab_size,
            **token_keys(config),
            "weight_data_type": dtype,
            "int8": False,
        }

    def config(self, section: Section) -> ModelConfig:
        """What config.ini describes."""
        return self.described(
            section,
            attention_of(section, position="learned"),
            tokens=(2, 2),
            norm_eps=section.number("layernorm_eps", float(_EPS)),
            norm_first=section.choice("layernorm_type", LAYERNORM_TYPES) == "pre_layernorm",
            final_norm=section.flag("has_post_decoder_layernorm", True),
            activation="relu",
            max_position_embeddings=section.count("max_pos_seq_len"),
            position_offset=_POSITION_OFFSET,
        )

    def tensors(self, specs: Iterable[WeightSpec], config: ModelConfig, ranks: int) -> Iterator[FileTensor]:
        """All tensors of a folder, in which projections are part of embedding and head."""
        by_name = {spec.name: spec for spec in specs}
        into, out = (by_name.pop(name, None) for name in _PROJECTIONS)
        for tensor in super().tensors(by_name.values(), config, ranks):
            projection = {"model.wte": into, "model.lm_head.weight": out}.get(tensor.name)
            if projection is not None:
                wide = replace(tensor.spec, axes=("vocab", "hidden"))
                yield replace(
                    tensor, spec=wide, derive=_product(tensor.spec, projection, transposed=projection is into)
                )
            elif tensor.name == "model.wpe":
                yield replace(tensor, skipped_rows=config.position_offset)
            else:
                yield tensor


def _product(table: WeightSpec, projection: WeightSpec, *, transposed: bool) -> Derive:
    """A table of narrow rows times a projection, in fp32."""

    def derive(shards: Shards, _: torch.dtype) -> Tensor:
        narrow, weight = shards(table, 0, 1).float(), shards(projection, 0, 1).float()
        return narrow @ (weight.t() if transposed else weight)

    return derive
