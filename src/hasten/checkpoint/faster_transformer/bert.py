"""BERT in FasterTransformer's format."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hasten.checkpoint.faster_transformer.family import Family, FileTensor, stored_tensors
from hasten.checkpoint.faster_transformer.ini import Section
from hasten.core.dtypes import DTypeName, dtype_name
from hasten.core.errors import CheckpointError
from hasten.core.model_config import ModelConfig, Task
from hasten.models.bert import BertModel
from hasten.models.weight_map import WeightSpec
from hasten.ops import TORCH_DTYPES

_ACTIVATIONS = ("gelu", "relu", "silu")
_WORDS, _TYPES = (f"model.embeddings.{kind}_embeddings.weight.bin" for kind in ("word", "token_type"))


class Bert(Family):
    """As `huggingface_bert_convert.py` writes it, under transformers' names, and more files.

    The runtime takes hidden states in place of token ids, so the converter writes layers alone. Embeddings, and where
    there is one a classifier, follow the same rule here: whole, in files that the runtime does not look for.
    """

    architecture = "BertModel"
    other_architectures = frozenset(
        f"BertFor{head}" for head in ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification")
    )
    tasks: ClassVar[frozenset[Task]] = frozenset({"embed", "classify", "token_classify"})
    label = "BERT"
    section = "bert"
    spaced = True
    fixed: ClassVar[Mapping[str, str]] = {"model_name": "bert", "position_embedding_type": "absolute"}

    def why_not(self, config: ModelConfig) -> str | None:
        """What of a model FasterTransformer cannot compute."""
        return None if config.activation in _ACTIVATIONS else f"activation {config.activation}"

    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of config.ini, in order; `model_name` is the type of every BERT."""
        return {
            "model_name": self.section,
            "position_embedding_type": "absolute",
            "hidden_size": config.hidden_size,
            "num_layer": config.num_layers,
            "head_num": config.attention.num_heads,
            "size_per_head": config.attention.head_size,
            "activation_type": config.activation,
            "inter_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "layer_norm_eps": config.norm_eps,
            "weight_data_type": dtype,
            "tensor_para_size": ranks,
        }

    def config(self, section: Section) -> ModelConfig:
        """What config.ini and the sizes of the embeddings' files describe: a model without a classifier."""
        dtype = dtype_name(section.text("weight_data_type"))
        hidden = section.count("hidden_size")
        heads, head_size = section.count("head_num"), section.count("size_per_head")
        if heads * head_size != hidden:
            raise CheckpointError(
                f"{section.path}: {heads} heads (head_num) of {head_size} (size_per_head) are not hidden_size {hidden}"
            )
        row = hidden * TORCH_DTYPES[dtype].itemsize
        raw: dict[str, Any] = {
            "hidden_size": hidden,
            "num_hidden_layers": section.count("num_layer"),
            "num_attention_heads": heads,
            "intermediate_size": section.count("inter_size"),
            "hidden_act": section.text("activation_type", "gelu").lower(),
            "max_position_embeddings": section.count("max_position_embeddings"),
            "layer_norm_eps": section.number("layer_norm_eps", 1e-12),
            "vocab_size": _rows(section, _WORDS, row),
            "type_vocab_size": _rows(section, _TYPES, row),
        }
        return replace(BertModel.config_from_hf(raw), dtype=dtype)

    def tensors_of(self, spec: WeightSpec) -> tuple[FileTensor, ...]:
        """The tensors that hold a parameter as it is, one or one for each of its parts."""
        tensors = stored_tensors(spec)
        return tuple(replace(each, name=self.prefix + each.name.removeprefix("bert.")) for each in tensors)


def _rows(section: Section, name: str, row: int) -> int:
    """Rows of a table of embeddings, from the size of its file."""
    path = section.path.parent / name
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: FasterTransformer's own converter leaves out what comes before BERT's layers; "
            "convert the original checkpoint with hasten convert"
        )
    return math.ceil(path.stat().st_size / row)
