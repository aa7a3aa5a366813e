"""T5 and mT5 in FasterTransformer's format."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.checkpoint.faster_transformer.family import Derive, Family, FileTensor, Shards, stored_tensors
from hasten.checkpoint.faster_transformer.ini import Section
from hasten.core.dtypes import DTypeName, dtype_name
from hasten.core.errors import UnsupportedError
from hasten.core.model_config import Activation, ModelConfig
from hasten.models import hf_config
from hasten.models.t5 import MT5ForConditionalGeneration, T5ForConditionalGeneration
from hasten.models.weight_map import WeightSpec
from hasten.parallel.shard import Split

_BUCKETS = "relative_attention_num_buckets_or_max_pos_seq_len"
_EPS, _FARTHEST = 1e-6, 128
"""What the runtime takes, whatever the model's."""
_PROJECTIONS: Mapping[tuple[bool, Activation], str] = {
    (True, "gelu_tanh"): "gated-gelu",
    (True, "relu"): "gated-relu",
    (True, "silu"): "gated-silu",
    (False, "gelu"): "gelu",
    (False, "relu"): "relu",
    (False, "silu"): "silu",
}
"""`feed_forward_proj`, by whether the MLP is gated and by its activation."""
_GATED = {".wi_0.weight": ".wi.weight", ".wi_1.weight": ".wi2.weight"}
"""Endings of the names of both halves of a gated unit: transformers' and FasterTransformer's."""


class T5(Family):
    """As `huggingface_t5_ckpt_convert.py` writes it, under transformers' names.

    The files of the embedding are both it and its transpose, of which the runtime reads the first. The head's file is
    always there. config.ini has those of transformers' keys that the runtime reads or that describe the model; the
    runtime scales the decoder's output where `tie_word_embeddings` is true, so that is what the key says.
    """

    architecture = "T5ForConditionalGeneration"
    model: ClassVar[type[T5ForConditionalGeneration]] = T5ForConditionalGeneration
    model_type: ClassVar[str] = "t5"
    label = "T5"
    section = "encoder"
    name_key = "_name_or_path"
    spaced = True
    prefix = ""
    of_all_ranks = "encoder.block.0.layer.0.SelfAttention.o.weight"
    parameters: ClassVar[Mapping[str, str]] = {"embedding.weight": "shared.weight_T", "head.weight": "lm_head.weight"}
    fixed: ClassVar[Mapping[str, str]] = {"model_type": model_type}
    structure: ClassVar[Mapping[str, str]] = {"t5_with_bias": "False", "position_embedding_type": "relative"}
    """The same as `fixed`, in a section of its own."""
    always_head = True

    def why_not(self, config: ModelConfig) -> str | None:
        """What of a model FasterTransformer cannot compute."""
        if config.attention.relative_farthest != _FARTHEST:
            return f"biases by distance up to {config.attention.relative_farthest}"
        if (config.gated_mlp, config.activation) not in _PROJECTIONS:
            return f"activation {config.activation}"
        return None if config.norm_eps == _EPS else f"epsilon {config.norm_eps}"

    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of the encoder's section, in order."""
        assert config.encoder is not None
        return self._stack(config, model_name, dtype, is_decoder=False, layers=config.encoder.num_layers)

    def sections(
        self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName
    ) -> dict[str, dict[str, object]]:
        """All sections of config.ini, in order."""
        return {
            self.section: self.ini(config, model_name, ranks, dtype),
            "decoder": self._stack(config, model_name, dtype, is_decoder=True, layers=config.num_layers),
            "structure": {
                "t5_with_bias": "false",
                "use_gated_activation": "1" if config.gated_mlp else "false",
                "position_embedding_type": "relative",
            },
        }

    def _stack(
        self, config: ModelConfig, model_name: str, dtype: DTypeName, *, is_decoder: bool, layers: int
    ) -> dict[str, object]:
        ends = config.eos_token_ids
        return {
            "vocab_size": config.vocab_size,
            "d_model": config.hidden_size,
            "d_kv": config.attention.head_size,
            "d_ff": config.intermediate_size,
            "num_layers": layers,
            "num_decoder_layers": config.num_layers,
            "num_heads": config.attention.num_heads,
            "relative_attention_max_distance": config.attention.relative_farthest,
            "layer_norm_epsilon": config.norm_eps,
            "feed_forward_proj": _PROJECTIONS[config.gated_mlp, config.activation],
            "is_decoder": is_decoder,
            "is_encoder_decoder": False,
            "tie_word_embeddings": config.logit_scale is not None,
            "decoder_start_token_id": config.decoder_start_token_id,
            "pad_token_id": config.pad_token_id,
            "eos_token_id": ends[0] if ends else None,
            "model_type": self.model_type,
            self.name_key: model_name,
            "weight_data_type": dtype,
            _BUCKETS: config.attention.relative_buckets,
        }

    def check(self, section: Section) -> None:
        """UnsupportedError names the key, or the part, that says that a folder is of no model of this family."""
        super().check(section)
        self.require(section.sibling("structure"), self.structure)
        if not section.sibling("decoder"):
            raise UnsupportedError(
                f"{section.path}: [decoder] is empty: it is of an encoder alone; convert the whole {self.label}"
            )

    def config(self, section: Section) -> ModelConfig:
        """What config.ini describes."""
        decoder = section.sibling("decoder")
        heads = ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size", "num_layers")
        raw: dict[str, Any] = {name: section.count(name) for name in heads}
        raw |= {
            "num_decoder_layers": decoder.count("num_layers"),
            "relative_attention_num_buckets": section.count(_BUCKETS),
            "relative_attention_max_distance": section.count("relative_attention_max_distance", _FARTHEST),
            "layer_norm_epsilon": section.number("layer_norm_epsilon", _EPS),
            "feed_forward_proj": section.text("feed_forward_proj"),
            # the files of head and embedding say whether they are one
            "tie_word_embeddings": True,
            "scale_decoder_outputs": decoder.flag("tie_word_embeddings", True),
            "decoder_start_token_id": decoder.count("decoder_start_token_id", 0),
            "pad_token_id": next(iter(decoder.ids("pad_token_id", 0)), None),
            "eos_token_id": list(decoder.ids("eos_token_id", 1)),
        }
        read = self.model.config_from_hf(raw)
        return replace(read, dtype=dtype_name(section.text("weight_data_type")))

    def unknown(self, section: Section) -> Iterable[str]:
        """Keys that hasten does not know, of a configuration of transformers."""
        given = hf_config.Fields(dict.fromkeys(section.unread(), ""))
        return given.unknown(self.model.hf_harmless | {"num_decoder_layers", "tie_word_embeddings"})

    def tensors(self, specs: Iterable[WeightSpec], config: ModelConfig, ranks: int) -> Iterator[FileTensor]:
        """All tensors of a folder, and the embedding's transpose."""
        for tensor in super().tensors(specs, config, ranks):
            yield tensor
            if tensor.name == "shared.weight_T":
                turned = replace(tensor.spec, axes=tensor.spec.axes[::-1])
                yield FileTensor("shared.weight", turned, derive=_transposed(tensor.spec), extra=True)

    def tensors_of(self, spec: WeightSpec) -> tuple[FileTensor, ...]:
        """The tensors that hold a parameter as it is, one or one for each of its parts."""
        if spec.name in self.parameters:
            return super().tensors_of(spec)
        first = spec.sources[0].name
        if spec.split is Split.QKV and first.startswith("decoder."):
            return (FileTensor(first.replace("SelfAttention.q.", "SelfAttention.qkv."), spec),)
        if "relative_attention_bias" in first:
            return (FileTensor(first, replace(spec, split=Split.ROW)),)
        return tuple(replace(tensor, name=_renamed(tensor.name)) for tensor in stored_tensors(spec))


class MT5(T5):
    """mT5, which its `model_type` tells from T5: its decoder's output is never scaled."""

    architecture = "MT5ForConditionalGeneration"
    model = MT5ForConditionalGeneration
    model_type = "mt5"
    label = "mT5"
    marks: ClassVar[Mapping[str, str]] = {"model_type": model_type}
    fixed = marks


def _renamed(name: str) -> str:
    theirs = next((ending for ending in _GATED if name.endswith(ending)), None)
    return name if theirs is None else name.removesuffix(theirs) + _GATED[theirs]


def _transposed(spec: WeightSpec) -> Derive:
    def derive(shards: Shards, _: torch.dtype) -> Tensor:
        return shards(spec, 0, 1).t()

    return derive
