"""LLaMA 1 to 3: RMS norms before each part, rotary positions, gated MLP, key/value heads shared by groups of queries.

Shapes: t tokens of the flat batch, h hidden.
Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig, RopeKind
from hasten.layers.attention import Attention
from hasten.layers.linear import GatedColumnLinear, RowLinear
from hasten.layers.norm import RMSNorm
from hasten.models import hf_config
from hasten.models.decoder import Decoder
from hasten.models.decoder_weights import BOTH_NORMS, decoder_weights, separate_qkv
from hasten.models.rope import ROPE_ALIASES, rope_from_hf
from hasten.models.weight_map import Axis, WeightMap, WeightSpec, linear, norm
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split


class LlamaBlock(nn.Module):
    """One layer: attention and gated MLP, each behind a norm and added to a residual."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__()
        group = groups.tensor
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.norm_eps
        self.last = layer == config.num_layers - 1
        offset = config.norm_offset
        self.input_norm = RMSNorm(hidden, eps=eps, unit_offset=offset, group=group)
        self.attention = Attention(hidden, config.attention_of(layer), norm_eps=eps, unit_offset=offset, group=group)
        self.post_norm = RMSNorm(hidden, eps=eps, unit_offset=offset, group=group)
        self.gate_up = GatedColumnLinear(hidden, inner, bias=config.mlp_bias, gate=config.activation, group=group)
        self.down = RowLinear(inner, hidden, bias=config.mlp_bias, group=group)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th, self.attention.qkv.packed)
        x_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        normed_th, residual_th = self.post_norm(x_th, self.gate_up.packed)
        return self.down(self.gate_up(normed_th, reader=self.down.packed), residual_th)


class LlamaForCausalLM(Decoder):
    """LLaMA with its language model head; families of the same build differ in their configuration, or in a block."""

    block: ClassVar[type[nn.Module]] = LlamaBlock

    def make_final_norm(self, config: ModelConfig, groups: ParallelGroups) -> RMSNorm:
        """The norm before the head."""
        return RMSNorm(config.hidden_size, eps=config.norm_eps, unit_offset=config.norm_offset, group=groups.tensor)

    hf_harmless: ClassVar[frozenset[str]] = frozenset({"attention_dropout", "initializer_range", "pretraining_tp"})

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, with the rope under its keys of old and new versions."""
        bias = hf_config.flag(raw, "attention_bias", False)
        attention = replace(attention_from_hf(raw, max_position=2048), qkv_bias=bias, dense_bias=bias)
        config = config_from_hf(raw, "LlamaForCausalLM", attention, max_position=2048, bos=1, eos=2)
        return replace(config, mlp_bias=hf_config.flag(raw, "mlp_bias", False))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map(config)


FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as `layer_types` in config.json calls them."""


def weight_map(config: ModelConfig, *, fused: bool = False, norms: Mapping[str, str] = BOTH_NORMS) -> WeightMap:
    """That of a model of this build; `fused`: its checkpoints hold QKV, and gate and up, as one tensor each."""

    def of_layer(layer: int) -> Iterator[WeightSpec]:
        yield from weights_before_mlp(config, layer, fused=fused, norms=norms)
        yield from mlp_weights(config, layer, "", fused=fused)

    return weight_map_of(config, of_layer)


def weight_map_of(
    config: ModelConfig, of_layer: Callable[[int], Iterable[WeightSpec]], *, norm_bias: bool = False
) -> WeightMap:
    """That of a model whose weights outside its layers have LLaMA's names; `norm_bias`: of the last norm."""
    return decoder_weights(
        config,
        of_layer,
        prefix="model.",
        embedding="embed_tokens",
        last=norm("final_norm", "norm", bias=norm_bias),
        ignored=("rotary_emb.inv_freq", "layers.{layer}.self_attn.rotary_emb.inv_freq"),
    )


def attention_from_hf(
    raw: Mapping[str, Any],
    *,
    max_position: int,
    kv_heads: int | None = None,
    head_size: int | None = None,
    rope_aliases: Mapping[str, RopeKind] = ROPE_ALIASES,
    rope_raw: Mapping[str, Any] | None = None,
    **rope: Any,
) -> AttentionConfig:
    """Heads and rope, without biases; the keywords are what a config.json that is silent stands for.

    Without `kv_heads` there are as many as query heads, without `head_size` they divide the width. `rope_aliases` are
    names under which a family knows kinds of ropes, `rope_raw` has the rope's keys where they are not in `raw` itself;
    `rope` are further keywords of `rope_from_hf`.
    """
    hidden, heads = hf_config.count(raw, "hidden_size"), hf_config.count(raw, "num_attention_heads")
    if raw.get("head_dim") is None and head_size is None and hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    size = hf_config.count(raw, "head_dim", default=head_size or hidden // heads)
    longest = hf_config.count(raw, "max_position_embeddings", default=max_position)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=hf_config.optional_count(raw, "num_key_value_heads", kv_heads) or heads,
        head_size=size,
        position="rope",
        rope=rope_from_hf(raw if rope_raw is None else rope_raw, size, longest, rope_aliases, **rope),
        qkv_bias=False,
        dense_bias=False,
    )


def layer_kinds(raw: Mapping[str, Any], default: Sequence[str]) -> Sequence[str]:
    """`layer_types`, or the default of each layer; errors name a list that does not fit and a kind that is unknown."""
    kinds = default if raw.get("layer_types") is None else raw["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise ConfigError(f"layer_types is not a list of {len(default)} kinds")
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise UnsupportedError(f"layer_types has {unknown[0]!r}; supported are {FULL} and {SLIDING}")
    return kinds


def with_layers(config: ModelConfig, kinds: Sequence[str], **sliding: Any) -> ModelConfig:
    """The configuration with layers of these kinds; `sliding`: fields of the attention of those with a window."""
    by_kind = {FULL: config.attention, SLIDING: replace(config.attention, **sliding)}
    return replace(config, layer_attention=tuple(by_kind[kind] for kind in kinds))


def config_from_hf(
    raw: Mapping[str, Any],
    architecture: str,
    attention: AttentionConfig,
    *,
    max_position: int,
    bos: int | None = None,
    eos: int | None = None,
) -> ModelConfig:
    """All that families of this build have in common, without biases in the MLP."""
    return ModelConfig(
        architecture=architecture,
        num_layers=hf_config.count(raw, "num_hidden_layers"),
        hidden_size=hf_config.count(raw, "hidden_size"),
        intermediate_size=hf_config.count(raw, "intermediate_size"),
        vocab_size=hf_config.count(raw, "vocab_size"),
        attention=attention,
        norm_eps=hf_config.fraction(raw, "rms_norm_eps", 1e-6),
        activation=hf_config.activation(raw, "hidden_act", "silu"),
        mlp_bias=False,
        max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=max_position),
        **hf_config.usual(raw, tied=False, bos=bos, eos=eos),
    )


def weights_before_mlp(
    config: ModelConfig, layer: int, *, fused: bool = False, norms: Mapping[str, str] = BOTH_NORMS
) -> Iterator[WeightSpec]:
    """The norms of a layer and its attention."""
    name = f"layers.{layer}"
    for ours, theirs in norms.items():
        yield from norm(f"{name}.{ours}", f"{name}.{theirs}", bias=False)
    yield from attention_weights(config, layer, fused=fused)
    if config.attention_of(layer).qk_norm:
        yield from norm(f"{name}.attention.query_norm", f"{name}.self_attn.q_norm", bias=False, axis="head")
        yield from norm(f"{name}.attention.key_norm", f"{name}.self_attn.k_norm", bias=False, axis="head")


def attention_weights(config: ModelConfig, layer: int, *, fused: bool = False) -> Iterator[WeightSpec]:
    """The projections of attention under LLaMA's names."""
    name, attention = f"layers.{layer}", config.attention_of(layer)
    whole: dict[str, Axis] = {f"{name}.self_attn.qkv_proj": "qkv"}
    qkv = whole if fused else separate_qkv(f"{name}.self_attn")
    dense: dict[str, Axis] = {f"{name}.self_attn.o_proj": "hidden"}
    yield from linear(f"{name}.attention.qkv", qkv, "qkv", "hidden", Split.QKV, bias=attention.qkv_bias)
    yield from linear(f"{name}.attention.dense", dense, "hidden", "query", Split.ROW, bias=attention.dense_bias)


def mlp_weights(config: ModelConfig, layer: int, prefix: str, *, fused: bool = False) -> Iterator[WeightSpec]:
    """A gated MLP under LLaMA's names; `prefix`: what the module's names have before `gate_up` and `down`."""
    name = f"layers.{layer}"
    gate_up: dict[str, Axis] = {f"{name}.mlp.gate_proj": "inner", f"{name}.mlp.up_proj": "inner"}
    down: dict[str, Axis] = {f"{name}.mlp.down_proj": "hidden"}
    if fused:
        gate_up = {f"{name}.mlp.gate_up_proj": "gate_up"}
    yield from linear(f"{name}.{prefix}gate_up", gate_up, "gate_up", "hidden", Split.GATE_UP, bias=config.mlp_bias)
    yield from linear(f"{name}.{prefix}down", down, "hidden", "inner", Split.ROW, bias=config.mlp_bias)
