"""ModernBERT: rotary positions, gated MLPs behind norms without bias, and windows in two of three layers.

Shapes: t tokens of the flat batch, h hidden.
Source: Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder", 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import (
    AttentionConfig,
    ClassifierConfig,
    MaskedWordsConfig,
    ModelConfig,
    Pooling,
    Task,
)
from hasten.layers.attention import Attention
from hasten.layers.mlp import GatedMLP
from hasten.layers.position import RelativeBias
from hasten.models import hf_config
from hasten.models.decoder import make_norm
from hasten.models.encoder import (
    Encoder,
    StoredWords,
    classifier_from_hf,
    encoder_weights,
    has_masked_words,
    masked_words_from_hf,
    task_from_hf,
)
from hasten.models.llama import FULL, SLIDING, layer_kinds
from hasten.models.rope import rope_from_hf, rope_of_kind
from hasten.models.weight_map import Axis, WeightMap, WeightSpec, linear, norm, vocabulary
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split

_MAX_POSITION = 8192
_THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}
"""By kind of layer: the key of a rope's theta in older files, and what a silent file stands for."""
_POOLINGS: Mapping[str, Pooling] = {"cls": "cls", "mean": "mean"}
_WORDS = StoredWords(dense="head.dense", norm="head.norm", decoder="decoder")


class ModernBertBlock(nn.Module):
    """One layer: attention and a gated MLP, each behind a norm and added to a residual; the first has one norm less."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups, bias: RelativeBias | None) -> None:
        super().__init__()
        hidden, inner, group = config.hidden_size, config.intermediate_size, groups.tensor
        self.last = layer == config.num_layers - 1
        self.input_norm = make_norm(config, groups) if layer else None
        self.attention = Attention(hidden, config.attention_of(layer), relative_bias=bias, group=group)
        self.post_norm = make_norm(config, groups)
        self.mlp = GatedMLP(hidden, inner, activation=config.activation, bias=config.mlp_bias, group=group)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        if self.input_norm is None:
            assert isinstance(x_th, Tensor), "the embedding's norm stands before the first layer"
            normed_th = residual_th = x_th
        else:
            normed_th, residual_th = self.input_norm(x_th)
        x_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        normed_th, residual_th = self.post_norm(x_th)
        return self.mlp(normed_th, residual_th)


class ModernBertModel(Encoder):
    """ModernBERT, as an encoder or with a classifier of texts or tokens."""

    block: ClassVar[type[nn.Module]] = ModernBertBlock
    # those of a head act where there is one
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        attention_dropout classifier_activation classifier_bias classifier_dropout classifier_pooling decoder_bias
        deterministic_flash_attn embedding_dropout
        initializer_cutoff_factor initializer_range layer_norm_eps max_position_embeddings mlp_dropout
        position_embedding_type reference_compile repad_logits_with_grad sentence_transformers sparse_pred_ignore_index
        sparse_prediction
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with the ropes under keys of old and new versions."""
        architecture, task = task_from_hf(raw)
        layers = hf_config.count(raw, "num_hidden_layers", default=22)
        every = hf_config.count(raw, "global_attn_every_n_layers", default=3)
        kinds = layer_kinds(raw, [SLIDING if layer % every else FULL for layer in range(layers)])
        attentions = {kind: _attention(raw, kind) for kind in (FULL, SLIDING)}
        config = ModelConfig(
            architecture=architecture or "ModernBertModel",
            task=task,
            classifier=_classifier(raw, task),
            masked_words=_masked_words(raw, architecture),
            num_layers=layers,
            hidden_size=hf_config.count(raw, "hidden_size", default=768),
            intermediate_size=hf_config.count(raw, "intermediate_size", default=1152),
            vocab_size=hf_config.count(raw, "vocab_size", default=50368),
            attention=attentions[FULL],
            layer_attention=tuple(attentions[kind] for kind in kinds),
            norm_eps=hf_config.fraction(raw, "norm_eps", 1e-5),
            norm_bias=hf_config.flag(raw, "norm_bias", False),
            activation=hf_config.activation(raw, "hidden_activation", "gelu"),
            mlp_bias=hf_config.flag(raw, "mlp_bias", False),
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=_MAX_POSITION),
            **hf_config.usual(raw, tied=True, bos=None, eos=None, pad=50283),
        )
        # end tokens of an encoder end nothing
        return replace(config, eos_token_ids=())

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return encoder_weights(
            config,
            partial(_of_layer, config),
            prefix="model.",
            first=(
                vocabulary("embedding.weight", "embeddings.tok_embeddings.weight"),
                *norm("embedding_norm", "embeddings.norm", bias=config.norm_bias),
            ),
            last=norm("final_norm", "final_norm", bias=config.norm_bias),
            dense="head.dense",
            words=_WORDS,
        )


def _masked_words(raw: Mapping[str, Any], architecture: str | None) -> MaskedWordsConfig | None:
    if not has_masked_words(architecture):
        return None
    activation = hf_config.activation(raw, "classifier_activation", "gelu")
    return masked_words_from_hf(
        architecture,
        activation,
        dense_bias=hf_config.flag(raw, "classifier_bias", False),
        bias=hf_config.flag(raw, "decoder_bias", True),
    )


def _classifier(raw: Mapping[str, Any], task: Task) -> ClassifierConfig | None:
    if task == "embed":
        return None
    name = "cls" if raw.get("classifier_pooling") is None else raw["classifier_pooling"]
    if name not in _POOLINGS:
        raise UnsupportedError(f"classifier_pooling {name!r} is not supported; supported are {', '.join(_POOLINGS)}")
    activation: Any = "gelu" if raw.get("classifier_activation") is None else raw["classifier_activation"]
    if activation not in ("gelu", "relu", "tanh"):
        raise UnsupportedError(f"classifier_activation {activation!r} is not supported; supported are gelu, relu, tanh")
    bias = hf_config.flag(raw, "classifier_bias", False)
    return classifier_from_hf(raw, task, pooling=_POOLINGS[name], dense=activation, dense_bias=bias, norm=True)


def _attention(raw: Mapping[str, Any], kind: str) -> AttentionConfig:
    hidden, heads = hf_config.width_and_heads(raw, ("hidden_size",), ("num_attention_heads",), default_heads=12)
    key, theta = _THETAS[kind]
    nested = raw.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        raise ConfigError(f"rope_parameters {nested!r:.80} is not an object")
    of_kind = {"rope_theta": hf_config.number(raw, key, theta), "rope_parameters": rope_of_kind(nested, kind)}
    bias = hf_config.flag(raw, "attention_bias", False)
    # half of the window lies before a token, half behind it
    window = hf_config.count(raw, "local_attention", default=128) // 2 + 1
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        position="rope",
        rope=rope_from_hf(of_kind, hidden // heads, _MAX_POSITION),
        window=window if kind == SLIDING else None,
        causal=False,
        qkv_bias=bias,
        dense_bias=bias,
    )


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    name, attention = f"layers.{layer}", config.attention
    for ours, theirs in {"input_norm": "attn_norm", "post_norm": "mlp_norm"}.items():
        if layer or ours == "post_norm":
            yield from norm(f"{name}.{ours}", f"{name}.{theirs}", bias=config.norm_bias)

    def part(ours: str, theirs: str, out: Axis, into: Axis, split: Split, bias: bool) -> tuple[WeightSpec, ...]:
        return linear(f"{name}.{ours}", {f"{name}.{theirs}": out}, out, into, split, bias=bias)

    yield from part("attention.qkv", "attn.Wqkv", "qkv", "hidden", Split.QKV, attention.qkv_bias)
    yield from part("attention.dense", "attn.Wo", "hidden", "query", Split.ROW, attention.dense_bias)
    yield from part("mlp.gate_up", "mlp.Wi", "gate_up", "hidden", Split.GATE_UP, config.mlp_bias)
    yield from part("mlp.down", "mlp.Wo", "hidden", "inner", Split.ROW, config.mlp_bias)
