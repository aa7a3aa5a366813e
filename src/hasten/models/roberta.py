"""RoBERTa and XLM-RoBERTa: BERT whose positions begin behind that of the padding token.

Sources: Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019; Conneau et al., "Unsupervised
Cross-lingual Representation Learning at Scale", 2020.
"""

from collections.abc import Mapping
from typing import Any

from hasten.core.errors import ConfigError
from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.bert import POOLER, bert_fields, bert_layer
from hasten.models.encoder import (
    Encoder,
    StoredWords,
    classifier_from_hf,
    embedding_weights,
    encoder_weights,
    masked_words_from_hf,
    task_from_hf,
)
from hasten.models.weight_map import WeightMap

WORDS = StoredWords(
    dense="lm_head.dense", norm="lm_head.layer_norm", decoder="lm_head.decoder", other_bias="lm_head.bias"
)


class RobertaModel(Encoder):
    """RoBERTa, as an encoder or with a classifier of texts or tokens."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        architecture, task = task_from_hf(raw)
        classifier = classifier_from_hf(raw, task, dense="tanh" if task == "classify" else None)
        fields = bert_fields(raw, pad=1)
        return ModelConfig(
            architecture=architecture or "RobertaModel",
            task=task,
            classifier=classifier,
            masked_words=masked_words_from_hf(architecture, "gelu"),
            **fields,
            **padded_positions(raw, fields["pad_token_id"]),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return encoder_weights(
            config,
            bert_layer,
            prefix="roberta.",
            first=embedding_weights(config),
            dense="classifier.dense",
            classifier="classifier.out_proj" if config.task == "classify" else "classifier",
            words=WORDS,
            ignored=POOLER,
        )


def padded_positions(raw: Mapping[str, Any], pad: int | None) -> dict[str, Any]:
    """Fields of a `ModelConfig` whose table of positions begins with rows of padding."""
    rows, pad = hf_config.count(raw, "max_position_embeddings", default=512), 1 if pad is None else pad
    if not 0 <= pad < rows - 1:
        raise ConfigError(f"pad_token_id {pad} leaves none of {rows} positions (max_position_embeddings)")
    return {"max_position_embeddings": rows - pad - 1, "position_offset": pad + 1, "skips_padding": True}
