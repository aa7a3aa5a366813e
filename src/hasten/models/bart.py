"""BART and mBART: learned positions in both stacks from row 2 of their tables; norms behind each part, or before it.

Shapes: t tokens of the flat batch, h hidden.
Sources: Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training", 2020; Liu et al., "Multilingual Denoising
Pre-training for Neural Machine Translation", 2020 (mBART).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.model_config import AttentionConfig, EncoderConfig, ModelConfig
from hasten.layers.attention import Attention, CrossAttention
from hasten.layers.embedding import Embedding, Head
from hasten.layers.mlp import MLP
from hasten.layers.norm import LayerNorm
from hasten.models import hf_config
from hasten.models.decoder import make_norm
from hasten.models.encoder import refuse
from hasten.models.encoder_decoder import DecoderBlock, EncoderBlock, EncoderDecoder
from hasten.models.weight_map import (
    Axis,
    Layout,
    StoredTensor,
    Tie,
    WeightMap,
    WeightSpec,
    linear,
    norm,
    positions,
    vocabulary,
    vocabulary_bias,
)
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split

Part = Callable[[Tensor, Tensor], Tensor | PartialSum]
"""What a layer adds to a residual: from its input and the residual to their sum."""


def _added(part: Part, norm: LayerNorm, x_th: Tensor | PartialSum, *, norm_first: bool) -> Tensor | PartialSum:
    """`x` + part(`x`), with a norm of what the part reads, or of the sum."""
    if norm_first:
        return part(*norm(x_th))
    assert isinstance(x_th, Tensor), "a norm has added it up"
    return norm(part(x_th, x_th))[0]


class BartEncoderBlock(EncoderBlock):
    """Attention and MLP, each added to a residual and normed, behind or before."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups) -> None:
        super().__init__()
        assert config.encoder is not None
        hidden, inner, group = config.hidden_size, config.encoder.intermediate_size, groups.tensor
        self.norm_first = config.norm_first
        self.attention = Attention(hidden, config.encoder.attention, group=group)
        self.attention_norm = make_norm(config, groups)
        self.mlp = MLP(hidden, inner, activation=config.activation, group=group)
        self.mlp_norm = make_norm(config, groups)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        added = partial(_added, norm_first=self.norm_first)
        x_th = added(lambda x, residual: self.attention(x, positions_t, meta, residual), self.attention_norm, x_th)
        return added(self.mlp, self.mlp_norm, x_th)


class BartDecoderBlock(DecoderBlock):
    """Attention, attention over what the encoder left, and MLP, each added to a residual and normed."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__()
        hidden, inner, group = config.hidden_size, config.intermediate_size, groups.tensor
        self.norm_first, self.last = config.norm_first, layer == config.num_layers - 1
        self.attention = Attention(hidden, config.attention, group=group)
        self.attention_norm = make_norm(config, groups)
        self.cross_attention = CrossAttention(hidden, config.attention, group=group)
        self.cross_norm = make_norm(config, groups)
        self.mlp = MLP(hidden, inner, activation=config.activation, group=group)
        self.mlp_norm = make_norm(config, groups)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        added, last = partial(_added, norm_first=self.norm_first), self.last
        x_th = added(
            lambda x, residual: self.attention(x, positions_t, meta, residual, last=last), self.attention_norm, x_th
        )
        x_th = added(lambda x, residual: self.cross_attention(x, meta, residual, last=last), self.cross_norm, x_th)
        return added(self.mlp, self.mlp_norm, x_th)


class BartForConditionalGeneration(EncoderDecoder):
    """BART with its language model head."""

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        activation_dropout attention_dropout classif_dropout classifier_dropout decoder_layerdrop dropout
        encoder_layerdrop init_std num_hidden_layers output_past
        """.split()
    )

    def build_start(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The embedding with the decoder's positions, and the encoder with its own."""
        assert config.encoder is not None
        self.embedding = Embedding(
            config.vocab_size,
            config.hidden_size,
            scale=config.embedding_scale,
            positions=config.num_positions,
            position_offset=config.position_offset,
            group=groups.tensor,
        )
        table = torch.empty(config.num_positions, config.hidden_size)
        self.encoder_positions = nn.Parameter(table, requires_grad=False)
        self.encoder_embedding_norm, self.embedding_norm = make_norm(config, groups), make_norm(config, groups)
        blocks = (BartEncoderBlock(config, groups) for _ in range(config.encoder.num_layers))
        self.encoder_layers = nn.ModuleList(blocks)
        self.encoder_norm = make_norm(config, groups) if config.final_norm else None

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """One layer of the decoder, by its number."""
        return BartDecoderBlock(config, layer, groups)

    def build_end(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The last norm, if there is one, and the head."""
        self.final_norm = make_norm(config, groups) if config.final_norm else None
        self.head = Head(
            config.vocab_size, config.hidden_size, tied=self.tied_embedding(config), bias=True, group=groups.tensor
        )

    def encoded(self, input_ids_t: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after the encoder's last layer or norm, [t, h]."""
        embedded_th = self.embedding(input_ids_t, positions_t, self.encoder_positions)
        x_th = self.encoder_embedding_norm(embedded_th)[0]
        for layer in self.encoder_layers:
            x_th = layer(x_th, positions_t, meta)
        return _normed(self.encoder_norm, x_th)

    def start(self, input_ids_t: Tensor, positions_t: Tensor) -> Tensor | PartialSum:
        """The embeddings after their norm."""
        return self.embedding_norm(self.embedding(input_ids_t, positions_t))[0]

    def end(self, x_th: Tensor | PartialSum) -> Tensor:
        """Hidden states after the last layer or norm."""
        return _normed(self.final_norm, x_th)

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        return config_from_hf(raw, "BartForConditionalGeneration", norm_first=False)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return _weight_map(config)


class MBartForConditionalGeneration(BartForConditionalGeneration):
    """mBART: BART for many languages, with norms before each part and behind the last layer of each stack."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        return config_from_hf(raw, "MBartForConditionalGeneration", norm_first=True)


def _normed(norm: LayerNorm | None, x_th: Tensor | PartialSum) -> Tensor:
    if norm is not None:
        return norm(x_th)[0]
    assert isinstance(x_th, Tensor), "the last layer's norm has added it up"
    return x_th


def config_from_hf(raw: Mapping[str, Any], architecture: str, *, norm_first: bool) -> ModelConfig:
    """All that both have in common; keys of very old files say of `norm_first` what the architecture says."""
    refuse(
        raw,
        {
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,  # else both stacks have embeddings of their own
            "normalize_before": norm_first,
            "add_final_layer_norm": norm_first,
            "normalize_embedding": True,
            "static_position_embeddings": False,
            "extra_pos_embeddings": 2,
            "add_bias_logits": False,
        },
    )
    hidden = hf_config.count(raw, "d_model", default=1024)
    usual = hf_config.usual(raw, tied=True, bos=0, eos=2, pad=1)
    start = hf_config.token(raw, "decoder_start_token_id", usual["bos_token_id"] if norm_first else 2)
    if start is None:
        raise ConfigError("config.json lacks 'decoder_start_token_id'")
    return ModelConfig(
        architecture=architecture,
        num_layers=hf_config.count(raw, "decoder_layers", default=12),
        hidden_size=hidden,
        intermediate_size=hf_config.count(raw, "decoder_ffn_dim", default=4096),
        vocab_size=hf_config.count(raw, "vocab_size", default=50265),
        attention=_attention(raw, hidden, "decoder_attention_heads"),
        norm_first=norm_first,
        final_norm=norm_first,
        activation=hf_config.activation(raw, "activation_function", "gelu"),
        embedding_scale=hidden**0.5 if hf_config.flag(raw, "scale_embedding", False) else None,
        head_bias=True,
        max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=1024),
        position_offset=2,
        encoder=EncoderConfig(
            num_layers=hf_config.count(raw, "encoder_layers", default=12),
            intermediate_size=hf_config.count(raw, "encoder_ffn_dim", default=4096),
            attention=replace(_attention(raw, hidden, "encoder_attention_heads"), causal=False),
        ),
        decoder_start_token_id=start,
        forced_bos_token_id=hf_config.token(raw, "forced_bos_token_id"),
        forced_eos_token_ids=hf_config.tokens(raw, "forced_eos_token_id", 2),
        **usual,
    )


def _attention(raw: Mapping[str, Any], hidden: int, heads: str) -> AttentionConfig:
    count = hf_config.count(raw, heads, default=16)
    if hidden % count:
        raise ConfigError(f"d_model {hidden} is not a multiple of {heads} {count}")
    return AttentionConfig(num_heads=count, num_kv_heads=count, head_size=hidden // count, position="learned")


_ROW = Layout(lambda tensor, _: tensor.squeeze(0))
"""A vector that is stored as a matrix of one row."""


def _weight_map(config: ModelConfig) -> WeightMap:
    assert config.encoder is not None
    embedding, head = vocabulary("embedding.weight", "shared.weight"), vocabulary("head.weight", "lm_head.weight")
    bias = vocabulary_bias("head.bias", "final_logits_bias")
    bias = replace(bias, sources=(StoredTensor("final_logits_bias", ("one", "vocab"), _ROW),))
    encoder = (_encoder_layer(layer) for layer in range(config.encoder.num_layers))
    decoder = (_decoder_layer(layer) for layer in range(config.num_layers))
    tied = config.tie_word_embeddings
    return WeightMap(
        specs=(
            embedding,
            positions("encoder_positions", "encoder.embed_positions.weight"),
            *norm("encoder_embedding_norm", "encoder.layernorm_embedding", bias=True),
            *chain.from_iterable(encoder),
            *(norm("encoder_norm", "encoder.layer_norm", bias=True) if config.final_norm else ()),
            positions("embedding.positions", "decoder.embed_positions.weight"),
            *norm("embedding_norm", "decoder.layernorm_embedding", bias=True),
            *chain.from_iterable(decoder),
            *(norm("final_norm", "decoder.layer_norm", bias=True) if config.final_norm else ()),
            *(() if tied else (head,)),
            bias,
        ),
        hf_prefix="model.",
        hf_unprefixed=frozenset({"lm_head.weight", "final_logits_bias"}),
        hf_ignored=("encoder.version", "decoder.version"),
        hf_aliases={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
        head_tie=Tie(head, embedding) if tied else None,
    )


def _encoder_layer(layer: int) -> Iterator[WeightSpec]:
    name, stored = f"encoder_layers.{layer}", f"encoder.layers.{layer}"
    yield from _self_attention(name, stored)
    yield from _mlp(name, stored, "encoder_inner")


def _decoder_layer(layer: int) -> Iterator[WeightSpec]:
    name, stored = f"layers.{layer}", f"decoder.layers.{layer}"
    cross, theirs = f"{name}.cross_attention", f"{stored}.encoder_attn"
    yield from _self_attention(name, stored)
    yield from linear(f"{cross}.query", {f"{theirs}.q_proj": "query"}, "query", "hidden", Split.COLUMN, bias=True)
    both: dict[str, Axis] = {f"{theirs}.k_proj": "kv", f"{theirs}.v_proj": "kv"}
    yield from linear(f"{cross}.key_value", both, "both_kv", "hidden", Split.GATE_UP, bias=True)
    yield from linear(f"{cross}.dense", {f"{theirs}.out_proj": "hidden"}, "hidden", "query", Split.ROW, bias=True)
    yield from norm(f"{name}.cross_norm", f"{stored}.encoder_attn_layer_norm", bias=True)
    yield from _mlp(name, stored, "inner")


def _self_attention(name: str, stored: str) -> Iterator[WeightSpec]:
    theirs = f"{stored}.self_attn"
    qkv: dict[str, Axis] = {f"{theirs}.q_proj": "query", f"{theirs}.k_proj": "kv", f"{theirs}.v_proj": "kv"}
    dense: dict[str, Axis] = {f"{theirs}.out_proj": "hidden"}
    yield from linear(f"{name}.attention.qkv", qkv, "qkv", "hidden", Split.QKV, bias=True)
    yield from linear(f"{name}.attention.dense", dense, "hidden", "query", Split.ROW, bias=True)
    yield from norm(f"{name}.attention_norm", f"{stored}.self_attn_layer_norm", bias=True)


def _mlp(name: str, stored: str, inner: Axis) -> Iterator[WeightSpec]:
    yield from linear(f"{name}.mlp.up", {f"{stored}.fc1": inner}, inner, "hidden", Split.COLUMN, bias=True)
    yield from linear(f"{name}.mlp.down", {f"{stored}.fc2": "hidden"}, "hidden", inner, Split.ROW, bias=True)
    yield from norm(f"{name}.mlp_norm", f"{stored}.final_layer_norm", bias=True)
