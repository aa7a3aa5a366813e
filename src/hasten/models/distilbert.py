"""DistilBERT: BERT without types of tokens, with names of its own.

Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.decoder_weights import plain_layer
from hasten.models.encoder import (
    HARMLESS,
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

_WORDS = StoredWords(dense="vocab_transform", norm="vocab_layer_norm", decoder="vocab_projector")
_EPS = 1e-12
"""Of every norm: config.json has no key for it."""


class DistilBertModel(Encoder):
    """DistilBERT, as an encoder or with a classifier of texts or tokens."""

    hf_harmless: ClassVar[frozenset[str]] = HARMLESS | frozenset(
        "attention_dropout dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_".split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        architecture, task = task_from_hf(raw)
        refuse(raw, {"add_cross_attention": False, "is_decoder": False})
        hidden, heads = hf_config.width_and_heads(raw, ("dim",), ("n_heads",), default_heads=12)
        activation = hf_config.activation(raw, "activation", "gelu")
        return ModelConfig(
            architecture=architecture or "DistilBertModel",
            task=task,
            classifier=classifier_from_hf(raw, task, dense="relu" if task == "classify" else None),
            num_layers=hf_config.count(raw, "n_layers", default=6),
            hidden_size=hidden,
            intermediate_size=hf_config.count(raw, "hidden_dim", default=4 * hidden),
            vocab_size=hf_config.count(raw, "vocab_size", default=30522),
            attention=AttentionConfig(
                num_heads=heads, num_kv_heads=heads, head_size=hidden // heads, position="learned", causal=False
            ),
            norm_eps=_EPS,
            norm_first=False,
            final_norm=False,
            activation=activation,
            masked_words=masked_words_from_hf(architecture, activation),
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=512),
            **hf_config.usual(raw, tied=True, bos=None, eos=None, pad=0),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return encoder_weights(
            config,
            _of_layer,
            prefix="distilbert.",
            first=embedding_weights(config),
            dense="pre_classifier",
            words=_WORDS,
        )


def _of_layer(layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"transformer.layer.{layer}",
        norms={"attention_norm": "sa_layer_norm", "output_norm": "output_layer_norm"},
        qkv={"attention.q_lin": "query", "attention.k_lin": "kv", "attention.v_lin": "kv"},
        dense="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
    )
