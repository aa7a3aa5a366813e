"""MPNet: RoBERTa without types of tokens, with a learned bias of each score for how far the key is from the query.

Source: Song et al., "MPNet: Masked and Permuted Pre-training for Language Understanding", 2020.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hasten.core.model_config import ModelConfig
from hasten.models.bert import POOLER, bert_fields
from hasten.models.decoder_weights import plain_layer
from hasten.models.encoder import (
    Encoder,
    classifier_from_hf,
    embedding_weights,
    encoder_weights,
    masked_words_from_hf,
    refuse,
    task_from_hf,
)
from hasten.models.roberta import WORDS, padded_positions
from hasten.models.weight_map import WeightMap, WeightSpec, table

_BUCKETS, _PAD = 32, 1
"""What transformers computes with, whatever config.json says."""


class MPNetModel(Encoder):
    """MPNet, as an encoder or with a classifier of texts or tokens."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        architecture, task = task_from_hf(raw)
        refuse(raw, {"relative_attention_num_buckets": _BUCKETS})
        fields = bert_fields(raw, pad=_PAD, position="learned", relative_buckets=_BUCKETS)
        return ModelConfig(
            architecture=architecture or "MPNetModel",
            task=task,
            classifier=classifier_from_hf(raw, task, dense="tanh" if task == "classify" else None),
            masked_words=masked_words_from_hf(architecture, "gelu"),
            **fields | {"token_types": 0, "pad_token_id": _PAD},
            **padded_positions(raw, _PAD),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        bias = table("relative_bias.weight", "encoder.relative_attention_bias.weight", "buckets", "heads")
        return encoder_weights(
            config,
            _of_layer,
            prefix="mpnet.",
            first=(*embedding_weights(config), bias),
            dense="classifier.dense",
            classifier="classifier.out_proj" if config.task == "classify" else "classifier",
            words=WORDS,
            ignored=POOLER,
        )


def _of_layer(layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"encoder.layer.{layer}",
        norms={"attention_norm": "attention.LayerNorm", "output_norm": "output.LayerNorm"},
        qkv={"attention.attn.q": "query", "attention.attn.k": "kv", "attention.attn.v": "kv"},
        dense="attention.attn.o",
        up="intermediate.dense",
        down="output.dense",
    )
