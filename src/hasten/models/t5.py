"""T5, in its versions 1.0 and 1.1 (Flan): RMS norms before each part, scores with learned biases by distance, no scale.

mT5 is of the build of version 1.1, and so is UMT5, whose layers have biases of their own.
Shapes: t tokens of the flat batch, h hidden.
Sources: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020; Xue
et al., "mT5", 2021; Chung et al., "UniMax: Fairer and More Effective Language Sampling", 2023 (UMT5).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, EncoderConfig, ModelConfig
from hasten.layers.attention import Attention, CrossAttention
from hasten.layers.embedding import Embedding, Head
from hasten.layers.mlp import MLP, GatedMLP
from hasten.layers.norm import RMSNorm
from hasten.layers.position import RelativeBias
from hasten.models import hf_config
from hasten.models.encoder import refuse
from hasten.models.encoder_decoder import DecoderBlock, EncoderBlock, EncoderDecoder
from hasten.models.weight_map import Axis, Tie, WeightMap, WeightSpec, linear, norm, table, vocabulary
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split


def _norm(config: ModelConfig, groups: ParallelGroups) -> RMSNorm:
    return RMSNorm(config.hidden_size, eps=config.norm_eps, group=groups.tensor)


def _mlp(config: ModelConfig, inner_size: int, groups: ParallelGroups) -> MLP | GatedMLP:
    kind = GatedMLP if config.gated_mlp else MLP
    return kind(config.hidden_size, inner_size, activation=config.activation, bias=False, group=groups.tensor)


def _bias(attention: AttentionConfig, groups: ParallelGroups) -> RelativeBias:
    return RelativeBias(attention, group=groups.tensor)


class T5EncoderBlock(EncoderBlock):
    """Attention and MLP, each behind a norm and added to a residual."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups, bias: RelativeBias | None) -> None:
        """`bias`: that of all layers; None: this one has its own."""
        super().__init__()
        assert config.encoder is not None
        heads, inner = config.encoder.attention, config.encoder.intermediate_size
        self.relative_bias = _bias(heads, groups) if bias is None else None
        self.input_norm = _norm(config, groups)
        shared = bias or self.relative_bias
        self.attention = Attention(config.hidden_size, heads, relative_bias=shared, group=groups.tensor)
        self.post_norm = _norm(config, groups)
        self.mlp = _mlp(config, inner, groups)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        x_th = self.attention(normed_th, positions_t, meta, residual_th)
        normed_th, residual_th = self.post_norm(x_th)
        return self.mlp(normed_th, residual_th)


class T5DecoderBlock(DecoderBlock):
    """Attention, attention over what the encoder left, and MLP, each behind a norm and added to a residual."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups, bias: RelativeBias | None) -> None:
        """`bias`: that of all layers; None: this one has its own."""
        super().__init__()
        hidden, heads, group = config.hidden_size, config.attention, groups.tensor
        self.last = layer == config.num_layers - 1
        self.relative_bias = _bias(heads, groups) if bias is None else None
        self.input_norm = _norm(config, groups)
        self.attention = Attention(hidden, heads, relative_bias=bias or self.relative_bias, group=group)
        self.cross_norm = _norm(config, groups)
        self.cross_attention = CrossAttention(hidden, heads, group=group)
        self.post_norm = _norm(config, groups)
        self.mlp = _mlp(config, config.intermediate_size, groups)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        x_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        normed_th, residual_th = self.cross_norm(x_th)
        x_th = self.cross_attention(normed_th, meta, residual_th, last=self.last)
        normed_th, residual_th = self.post_norm(x_th)
        return self.mlp(normed_th, residual_th)


class T5ForConditionalGeneration(EncoderDecoder):
    """T5 with its language model head."""

    own_biases: ClassVar[bool] = False
    """Whether each layer has biases of its own; else those of a stack share them."""
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        classifier_dropout dropout_rate initializer_factor max_length n_positions output_past
        """.split()
    )

    def build_start(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The embedding, the encoder and the biases of the decoder."""
        assert config.encoder is not None
        shared = not self.own_biases
        self.embedding = Embedding(config.vocab_size, config.hidden_size, group=groups.tensor)
        self.encoder_bias = _bias(config.encoder.attention, groups) if shared else None
        self.decoder_bias = _bias(config.attention, groups) if shared else None
        blocks = (T5EncoderBlock(config, groups, self.encoder_bias) for _ in range(config.encoder.num_layers))
        self.encoder_layers = nn.ModuleList(blocks)
        self.encoder_norm = _norm(config, groups)

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """One layer of the decoder, by its number."""
        return T5DecoderBlock(config, layer, groups, self.decoder_bias)

    def build_end(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The last norm and the head."""
        self.final_norm = _norm(config, groups)
        self.head = Head(
            config.vocab_size,
            config.hidden_size,
            tied=self.tied_embedding(config),
            scale=config.logit_scale,
            group=groups.tensor,
        )

    def encoded(self, input_ids_t: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after the encoder's last norm, [t, h]."""
        x_th = self.start(input_ids_t, positions_t)
        for layer in self.encoder_layers:
            x_th = layer(x_th, positions_t, meta)
        return self.encoder_norm(x_th)[0]

    def start(self, input_ids_t: Tensor, positions_t: Tensor) -> Tensor | PartialSum:
        """The embeddings, of either stack."""
        return self.embedding(input_ids_t, positions_t)

    def end(self, x_th: Tensor | PartialSum) -> Tensor:
        """Hidden states after the last norm."""
        return self.final_norm(x_th)[0]

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        # transformers 5 ties every head, and keeps here whether the output is scaled as that of a tied one
        tied = hf_config.flag(raw, "tie_word_embeddings", True)
        return config_from_hf(
            raw, "T5ForConditionalGeneration", scaled=hf_config.flag(raw, "scale_decoder_outputs", tied)
        )

    @classmethod
    def weight_map(cls, config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return _weight_map(config, own_biases=cls.own_biases)


class MT5ForConditionalGeneration(T5ForConditionalGeneration):
    """mT5: T5 1.1 for many languages."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        return config_from_hf(raw, "MT5ForConditionalGeneration", projection="gated-gelu", scaled=False)


class UMT5ForConditionalGeneration(T5ForConditionalGeneration):
    """UMT5: mT5 whose layers have biases of their own."""

    own_biases: ClassVar[bool] = True

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        tied = hf_config.flag(raw, "tie_word_embeddings", True)
        return config_from_hf(raw, "UMT5ForConditionalGeneration", projection="gated-gelu", scaled=tied)


def config_from_hf(raw: Mapping[str, Any], architecture: str, *, scaled: bool, projection: str = "relu") -> ModelConfig:
    """All that the versions have in common; `scaled`: whether logits are divided by the root of the width.

    `projection` is what a config.json stands for that is silent about the MLP.
    """
    refuse(raw, {"is_encoder_decoder": True})
    hidden, inner, layers = (hf_config.count(raw, name) for name in ("d_model", "d_ff", "num_layers"))
    heads = hf_config.count(raw, "num_heads")
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hf_config.count(raw, "d_kv"),
        position="none",
        relative_buckets=hf_config.count(raw, "relative_attention_num_buckets", default=32),
        relative_farthest=hf_config.count(raw, "relative_attention_max_distance", default=128),
        scale=1.0,
        qkv_bias=False,
        dense_bias=False,
    )
    usual = hf_config.usual(raw, tied=True, bos=None, eos=1, pad=0)
    kind, activation = _projection(raw, projection)
    return ModelConfig(
        architecture=architecture,
        num_layers=hf_config.optional_count(raw, "num_decoder_layers", None) or layers,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=hf_config.count(raw, "vocab_size"),
        attention=attention,
        norm_eps=hf_config.fraction(raw, "layer_norm_epsilon", 1e-6),
        activation=activation,
        gated_mlp=kind == "gated",
        mlp_bias=False,
        norm_bias=False,
        logit_scale=hidden**-0.5 if scaled else None,
        encoder=EncoderConfig(num_layers=layers, intermediate_size=inner, attention=replace(attention, causal=False)),
        decoder_start_token_id=hf_config.token(raw, "decoder_start_token_id", usual["pad_token_id"] or 0),
        **usual,
    )


def _projection(raw: Mapping[str, Any], default: str) -> tuple[str, Any]:
    """Whether the MLP is `gated` or `plain`, and its activation."""
    value = default if raw.get("feed_forward_proj") is None else raw["feed_forward_proj"]
    kind, _, name = str(value).rpartition("-")
    if kind not in ("", "gated"):
        raise UnsupportedError(f"feed_forward_proj {value!r} is not supported; it is an activation, or gated- and one")
    name = "gelu_new" if value == "gated-gelu" else name  # as transformers takes it
    activation = hf_config.activation({"feed_forward_proj": name}, "feed_forward_proj", name)
    # what transformers makes of it stands beside it in newer files, which it then follows
    if raw.get("dense_act_fn") is not None:
        activation = hf_config.activation(raw, "dense_act_fn", name)
    gated = hf_config.flag(raw, "is_gated_act", kind == "gated")
    return "gated" if gated else "plain", activation


def _weight_map(config: ModelConfig, *, own_biases: bool) -> WeightMap:
    assert config.encoder is not None
    embedding, head = vocabulary("embedding.weight", "shared.weight"), vocabulary("head.weight", "lm_head.weight")
    encoder = (_encoder_layer(config, layer, own_biases) for layer in range(config.encoder.num_layers))
    decoder = (_decoder_layer(config, layer, own_biases) for layer in range(config.num_layers))
    tied = config.tie_word_embeddings
    return WeightMap(
        specs=(
            embedding,
            *(() if own_biases else (_bias_spec("encoder_bias", "encoder.block.0", "encoder_heads"),)),
            *chain.from_iterable(encoder),
            *norm("encoder_norm", "encoder.final_layer_norm", bias=False),
            *(() if own_biases else (_bias_spec("decoder_bias", "decoder.block.0", "heads"),)),
            *chain.from_iterable(decoder),
            *norm("final_norm", "decoder.final_layer_norm", bias=False),
            *(() if tied else (head,)),
        ),
        hf_prefix="",
        hf_unprefixed=frozenset({"lm_head.weight"}),
        hf_ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        hf_aliases={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
        head_tie=Tie(head, embedding) if tied else None,
    )


def _bias_spec(name: str, block: str, heads: Axis) -> WeightSpec:
    return table(f"{name}.weight", f"{block}.layer.0.SelfAttention.relative_attention_bias.weight", "buckets", heads)


def _encoder_layer(config: ModelConfig, layer: int, own_bias: bool) -> Iterator[WeightSpec]:
    name, stored = f"encoder_layers.{layer}", f"encoder.block.{layer}"
    if own_bias:
        yield _bias_spec(f"{name}.relative_bias", stored, "encoder_heads")
    yield from _self_attention(name, stored)
    yield from norm(f"{name}.post_norm", f"{stored}.layer.1.layer_norm", bias=False)
    yield from _mlp_weights(config, f"{name}.mlp", f"{stored}.layer.1.DenseReluDense", "encoder_inner")


def _decoder_layer(config: ModelConfig, layer: int, own_bias: bool) -> Iterator[WeightSpec]:
    name, stored = f"layers.{layer}", f"decoder.block.{layer}"
    cross, theirs = f"{name}.cross_attention", f"{stored}.layer.1.EncDecAttention"
    if own_bias:
        yield _bias_spec(f"{name}.relative_bias", stored, "heads")
    yield from _self_attention(name, stored)
    yield from norm(f"{name}.cross_norm", f"{stored}.layer.1.layer_norm", bias=False)
    yield from linear(f"{cross}.query", {f"{theirs}.q": "query"}, "query", "hidden", Split.COLUMN, bias=False)
    both: dict[str, Axis] = {f"{theirs}.k": "kv", f"{theirs}.v": "kv"}
    yield from linear(f"{cross}.key_value", both, "both_kv", "hidden", Split.GATE_UP, bias=False)
    yield from linear(f"{cross}.dense", {f"{theirs}.o": "hidden"}, "hidden", "query", Split.ROW, bias=False)
    yield from norm(f"{name}.post_norm", f"{stored}.layer.2.layer_norm", bias=False)
    yield from _mlp_weights(config, f"{name}.mlp", f"{stored}.layer.2.DenseReluDense", "inner")


def _self_attention(name: str, stored: str) -> Iterator[WeightSpec]:
    theirs = f"{stored}.layer.0.SelfAttention"
    qkv: dict[str, Axis] = {f"{theirs}.q": "query", f"{theirs}.k": "kv", f"{theirs}.v": "kv"}
    yield from norm(f"{name}.input_norm", f"{stored}.layer.0.layer_norm", bias=False)
    yield from linear(f"{name}.attention.qkv", qkv, "qkv", "hidden", Split.QKV, bias=False)
    yield from linear(f"{name}.attention.dense", {f"{theirs}.o": "hidden"}, "hidden", "query", Split.ROW, bias=False)


def _mlp_weights(config: ModelConfig, name: str, stored: str, inner: Axis) -> Iterator[WeightSpec]:
    both: Axis = "encoder_gate_up" if inner == "encoder_inner" else "gate_up"
    if config.gated_mlp:
        halves: dict[str, Axis] = {f"{stored}.wi_0": inner, f"{stored}.wi_1": inner}
        yield from linear(f"{name}.gate_up", halves, both, "hidden", Split.GATE_UP, bias=False)
    else:
        yield from linear(f"{name}.up", {f"{stored}.wi": inner}, inner, "hidden", Split.COLUMN, bias=False)
    yield from linear(f"{name}.down", {f"{stored}.wo": "hidden"}, "hidden", inner, Split.ROW, bias=False)
