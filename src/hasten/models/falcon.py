"""Falcon, of all forms: one key/value head, groups, or as many as query heads; ALiBi or rotations; parallel or not.

Source: Almazrouei et al., "The Falcon Series of Open Language Models", 2023.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.decoder import Decoder, ParallelBlock, SequentialBlock, TwinNormBlock
from hasten.models.decoder_weights import BOTH_NORMS, decoder_weights, plain_layer
from hasten.models.rope import rope_from_hf
from hasten.models.weight_map import HEAD_MAJOR, WeightMap, WeightSpec, norm
from hasten.parallel.groups import ParallelGroups

_MAX_POSITION, _HEADS = 2048, 71


class FalconForCausalLM(Decoder):
    """Falcon with its language model head."""

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """Attention and MLP behind one norm (7B, 11B) or two (40B, 180B), or one after the other (RW)."""
        parallel = TwinNormBlock if config.mlp_norm else ParallelBlock
        block = parallel if config.parallel_residual else SequentialBlock
        return block(config, layer, groups)

    # `auto_map` names code of the hub that computes what transformers' own does
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "attention_dropout auto_map ff_factor hidden_dropout initializer_range".split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, the keys of the time before Falcon was part of transformers included."""
        if hf_config.flag(raw, "apply_residual_connection_post_layernorm", False):
            raise UnsupportedError("apply_residual_connection_post_layernorm is not supported in Falcon")
        hidden, heads = hf_config.width_and_heads(
            raw, ("n_embed", "hidden_size"), ("n_head", "num_attention_heads"), _HEADS
        )
        bias = hf_config.flag(raw, "bias", False)
        parallel, two_norms = _residuals(raw)
        return ModelConfig(
            architecture="FalconForCausalLM",
            num_layers=hf_config.count(raw, "n_layer", "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=hf_config.count(raw, "ffn_hidden_size", default=4 * hidden),
            vocab_size=hf_config.count(raw, "vocab_size", default=65_024),
            attention=_attention(raw, heads, hidden // heads, bias),
            norm_eps=hf_config.fraction(raw, "layer_norm_epsilon", 1e-5),
            activation=hf_config.activation(raw, "activation", "gelu"),
            mlp_bias=bias,
            mlp_norm=two_norms,
            parallel_residual=parallel,
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=_MAX_POSITION),
            **hf_config.usual(raw, tied=True, bos=11, eos=11),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return decoder_weights(
            config,
            partial(_of_layer, config),
            prefix="transformer.",
            embedding="word_embeddings",
            last=norm("final_norm", "ln_f", bias=True),
        )


def _new(raw: Mapping[str, Any]) -> bool:
    """Whether it is of the second architecture, which old keys tell by the number of key/value heads."""
    return hf_config.flag(raw, "new_decoder_architecture", raw.get("n_head_kv") is not None)


def _residuals(raw: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether attention and MLP stand side by side, and whether the MLP has a norm of its own."""
    new, parallel = _new(raw), hf_config.flag(raw, "parallel_attn", True)
    norms = hf_config.count(raw, "num_ln_in_parallel_attn", default=2 if new else 1)
    if norms > 2 or (norms == 2 and not new):
        raise UnsupportedError(f"num_ln_in_parallel_attn {norms} is not supported in this form of Falcon")
    if new and not parallel:
        raise UnsupportedError("parallel_attn false is not supported with new_decoder_architecture")
    return parallel, norms == 2 or not parallel


def _attention(raw: Mapping[str, Any], heads: int, head_size: int, bias: bool) -> AttentionConfig:
    kv_heads = hf_config.count(raw, "n_head_kv", "num_kv_heads", default=heads)
    multi_query = hf_config.flag(raw, "multi_query", True)  # says nothing of the second architecture
    if not _new(raw):  # num_kv_heads is then there as well, and says nothing
        kv_heads = 1 if multi_query else heads
    alibi = hf_config.flag(raw, "alibi", False)
    longest = hf_config.count(raw, "max_position_embeddings", default=_MAX_POSITION)
    rope = rope_from_hf(raw, head_size, longest)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        position="alibi" if alibi else "rope",
        rope=None if alibi else rope,
        alibi_scaled=alibi,
        qkv_bias=bias,
        dense_bias=bias,
    )


def _norms(config: ModelConfig) -> Mapping[str, str]:
    """The norms of a layer: the module's names and the checkpoint's."""
    if config.parallel_residual and config.mlp_norm:
        return {"input_norm": "ln_attn", "post_norm": "ln_mlp"}
    return BOTH_NORMS if config.mlp_norm else {"input_norm": "input_layernorm"}


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"h.{layer}",
        norms=_norms(config),
        qkv={"self_attention.query_key_value": "qkv"},
        dense="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        qkv_bias=config.mlp_bias,
        dense_bias=config.mlp_bias,
        mlp_bias=config.mlp_bias,
        qkv_layout=HEAD_MAJOR,
    )
