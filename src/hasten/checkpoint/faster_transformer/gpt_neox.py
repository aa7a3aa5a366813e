"""GPT-NeoX and Pythia in FasterTransformer's format."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hasten.checkpoint.faster_transformer.family import (
    LAYER_MODULES,
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
from hasten.core.model_config import ModelConfig, RopeConfig
from hasten.models.weight_map import WeightSpec

_EPS = 1e-5
"""What the runtime takes, whatever the model's."""
_ATTENTION_BIAS, _MLP_BIAS = "attention.dense.bias", "mlp.down.bias"


class GPTNeoX(Family):
    """As `huggingface_gptneox_convert.py` writes it, but for the biases of models whose residuals are not parallel.

    With parallel residuals the runtime adds the sum of both biases on every rank before it sums over the ranks, so the
    files have them divided by the ranks. Otherwise it adds each once, after that; the converter divides them all the
    same, and `huggingface_jp_gptneox_convert.py` never does.
    """

    architecture = "GPTNeoXForCausalLM"
    label = "GPT-NeoX"
    section = "gptneox"
    modules: ClassVar[Mapping[str, str]] = LAYER_MODULES | {"final_norm": "final_layernorm", "head": "lm_head"}
    unsaid = (
        "which GELU the model has, and the exact one is assumed, as in Pythia; put the checkpoint's config.json beside "
        "it if it is another"
    )
    always_head = True

    def why_not(self, config: ModelConfig) -> str | None:
        """What of a model FasterTransformer cannot compute."""
        rope = config.attention.rope
        if rope is None or rope != RopeConfig(width=rope.width):
            return "rotary positions of another kind or base than 10000"
        if config.activation not in ("gelu", "gelu_tanh"):
            return f"activation {config.activation}"
        if not config.attention.qkv_bias:
            return "attention without biases"
        return None if config.norm_eps == _EPS else f"epsilon {config.norm_eps}"

    def unclear(self, config: ModelConfig, ranks: int) -> str | None:
        """What FasterTransformer's own converters contradict each other in."""
        if ranks == 1 or config.parallel_residual:
            return None
        return (
            f"use_gptj_residual is 0 and there are {ranks} ranks: some of FasterTransformer's converters divide "
            "attention.dense.bias and mlp.dense_4h_to_h.bias by the ranks, some do not, and nothing says which wrote it"
        )

    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of config.ini, in order."""
        assert config.attention.rope is not None
        return {
            **size_keys(config, model_name),
            "num_layer": config.num_layers,
            "rotary_embedding": config.attention.rope.width,
            "vocab_size": config.vocab_size,
            **token_keys(config),
            "use_gptj_residual": int(config.parallel_residual),
            "weight_data_type": dtype,
        }

    def config(self, section: Section) -> ModelConfig:
        """What config.ini describes."""
        rope = RopeConfig(width=section.count("rotary_embedding"))
        return self.described(
            section,
            attention_of(section, position="rope", rope=rope),
            tokens=(0, 2),
            norm_eps=_EPS,
            activation="gelu",
            parallel_residual=section.flag("use_gptj_residual", True),
            tie_word_embeddings=False,
        )

    def tensors(self, specs: Iterable[WeightSpec], config: ModelConfig, ranks: int) -> Iterator[FileTensor]:
        """All tensors of a folder; with parallel residuals biases that each rank adds, and their sums."""
        attention_bias: WeightSpec | None = None
        for tensor in super().tensors(specs, config, ranks):
            spec = tensor.spec
            if not (config.parallel_residual and spec.name.endswith((_ATTENTION_BIAS, _MLP_BIAS))):
                yield tensor
                continue
            yield replace(tensor, derive=_divided(spec, ranks), restore=lambda stored: stored * ranks)
            if spec.name.endswith(_ATTENTION_BIAS):
                attention_bias = spec
            elif attention_bias is not None:
                name = tensor.name.replace("mlp.dense_4h_to_h.bias", "mlp.attention.bias.sum")
                yield FileTensor(name, spec, derive=_sum(attention_bias, spec, ranks), extra=True)


def _divided(spec: WeightSpec, ranks: int) -> Derive:
    def derive(shards: Shards, dtype: torch.dtype) -> Tensor:
        return shards(spec, 0, 1).to(dtype) / ranks

    return derive


def _sum(first: WeightSpec, second: WeightSpec, ranks: int) -> Derive:
    def derive(shards: Shards, dtype: torch.dtype) -> Tensor:
        return _divided(first, ranks)(shards, dtype) + _divided(second, ranks)(shards, dtype)

    return derive
