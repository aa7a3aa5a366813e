"""BERT: learned positions and types of tokens, every sum normed, attention in both directions.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.decoder_weights import plain_layer
from hasten.models.encoder import (
    Encoder,
    StoredWords,
    classifier_from_hf,
    embedding_weights,
    encoder_weights,
    masked_words_from_hf,
    refuse,
    task_from_hf,
)
from hasten.models.weight_map import WeightMap, WeightSpec

SUPPORTED: Mapping[str, Any] = {
    "add_cross_attention": False,
    "is_decoder": False,
    "position_embedding_type": "absolute",
}
"""Keys that change what BERT computes, and the values that it was trained with."""
_WORDS = StoredWords(
    dense="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm",
    decoder="cls.predictions.decoder",
    other_bias="cls.predictions.bias",
)
_NEXT_SENTENCE = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")
POOLER = ("pooler.dense.weight", "pooler.dense.bias")


class BertModel(Encoder):
    """BERT, as an encoder or with a classifier of texts or tokens."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        architecture, task = task_from_hf(raw)
        classifier = classifier_from_hf(raw, task, dense="tanh" if task == "classify" else None)
        fields = bert_fields(raw, pad=0)
        return ModelConfig(
            architecture=architecture or "BertModel",
            task=task,
            classifier=classifier,
            masked_words=masked_words_from_hf(architecture, fields["activation"]),
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=512),
            **fields,
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        pooled = config.task == "classify"
        return encoder_weights(
            config,
            bert_layer,
            prefix="bert.",
            first=embedding_weights(config),
            dense="bert.pooler.dense",
            words=_WORDS,
            ignored=(*_NEXT_SENTENCE, *(() if pooled else POOLER)),
        )


def bert_fields(raw: Mapping[str, Any], *, pad: int, **attention: Any) -> dict[str, Any]:
    """Fields of a `ModelConfig` under BERT's keys; `attention`: those of its attention, if not learned positions."""
    refuse(raw, SUPPORTED)
    hidden, heads = hf_config.width_and_heads(
        raw, ("hidden_size",), ("num_attention_heads",), default_heads=12 if "hidden_size" in raw else None
    )
    return {
        "num_layers": hf_config.count(raw, "num_hidden_layers", default=12),
        "hidden_size": hidden,
        "intermediate_size": hf_config.count(raw, "intermediate_size", default=3072),
        "vocab_size": hf_config.count(raw, "vocab_size", default=30522),
        "attention": AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_size=hidden // heads,
            causal=False,
            **({"position": "learned"} | attention),
        ),
        "norm_eps": hf_config.fraction(raw, "layer_norm_eps", 1e-12),
        "activation": hf_config.activation(raw, "hidden_act", "gelu"),
        "token_types": hf_config.count(raw, "type_vocab_size", default=2),
        "norm_first": False,
        "final_norm": False,
        **hf_config.usual(raw, tied=True, bos=None, eos=None, pad=pad),
    }


def bert_layer(layer: int) -> Iterator[WeightSpec]:
    """The weights of a layer under BERT's names."""
    return plain_layer(
        layer,
        f"encoder.layer.{layer}",
        norms={"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"},
        qkv={"attention.self.query": "query", "attention.self.key": "kv", "attention.self.value": "kv"},
        dense="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
    )
