"""Gemma 1, 2 and 3 (text): scaled embeddings, norms whose weights are stored less one, gates by GELU.

Gemma 2 and 3 norm what attention and MLP add as well, and alternate layers with and without a window.
Shapes: t tokens of the flat batch, h hidden.
Sources: Gemma Team, "Gemma", 2024; "Gemma 2", 2024; "Gemma 3 Technical Report", 2025.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.layers.attention import Attention
from hasten.layers.linear import GatedColumnLinear, RowLinear
from hasten.layers.norm import RMSNorm
from hasten.models import hf_config
from hasten.models.llama import (
    FULL,
    SLIDING,
    LlamaForCausalLM,
    attention_from_hf,
    config_from_hf,
    layer_kinds,
    weight_map,
    with_layers,
)
from hasten.models.rope import rope_from_hf, rope_of_kind
from hasten.models.weight_map import WeightMap
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups

_NORMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_WINDOW, _HEAD_SIZE = 4096, 256


class Gemma2Block(nn.Module):
    """One layer: attention and gated MLP, each between two norms and then added to a residual."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__()
        group = groups.tensor
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.norm_eps
        self.last = layer == config.num_layers - 1
        self.input_norm, self.post_attention_norm, self.pre_mlp_norm, self.post_mlp_norm = (
            RMSNorm(hidden, eps=eps, unit_offset=True, group=group) for _ in _NORMS
        )
        self.attention = Attention(hidden, config.attention_of(layer), norm_eps=eps, unit_offset=True, group=group)
        self.gate_up = GatedColumnLinear(hidden, inner, bias=config.mlp_bias, gate=config.activation, group=group)
        self.down = RowLinear(inner, hidden, bias=config.mlp_bias, group=group)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> PartialSum:
        """Hidden states after this layer, as a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        added_th, _ = self.post_attention_norm(self.attention(normed_th, positions_t, meta, None, last=self.last))
        rows_t = meta.output_part.output_indices if self.last and meta.output_part is not None else None
        normed_th, residual_th = self.pre_mlp_norm(PartialSum(added_th, residual=residual_th, residual_indices=rows_t))
        added_th, _ = self.post_mlp_norm(self.down(self.gate_up(normed_th, reader=self.down.packed), None))
        return PartialSum(added_th, residual=residual_th)


class GemmaForCausalLM(LlamaForCausalLM):
    """Gemma 1 with its language model head."""

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, in which `gelu` means the one by tanh."""
        attention = attention_from_hf(raw, max_position=8192, kv_heads=16, head_size=_HEAD_SIZE)
        config = _config(raw, "GemmaForCausalLM", attention, 8192)
        return replace(config, activation="gelu_tanh") if config.activation == "gelu" else config


class Gemma2ForCausalLM(LlamaForCausalLM):
    """Gemma 2 with its language model head."""

    block: ClassVar[type[nn.Module]] = Gemma2Block

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; layers 0, 2, 4, ... have a window unless `layer_types` says otherwise."""
        attention = attention_from_hf(raw, max_position=8192, kv_heads=4, head_size=_HEAD_SIZE)
        attention = replace(attention, scale=_scale(raw), softcap=_cap(raw, "attn_logit_softcapping", 50.0))
        config = _config(raw, "Gemma2ForCausalLM", attention, 8192)
        config = replace(config, logit_softcap=_cap(raw, "final_logit_softcapping", 30.0))
        return _with_windows(raw, config, every=2)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map(config, norms=_NORMS)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3, the text model, with its language model head."""

    # transformers writes it next to `layer_types`, which it stands for
    hf_harmless: ClassVar[frozenset[str]] = Gemma2ForCausalLM.hf_harmless | {"_sliding_window_pattern"}

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; every sixth layer has no window, and a rope of its own."""
        if _cap(raw, "attn_logit_softcapping", None) is not None:
            raise UnsupportedError("attn_logit_softcapping is not supported in Gemma 3")
        if hf_config.flag(raw, "use_bidirectional_attention", False):
            raise UnsupportedError("use_bidirectional_attention is not supported")
        nested = raw.get("rope_parameters")
        ropes: Mapping[str, Any] = nested if isinstance(nested, Mapping) and FULL in nested else {}
        of_full = {"rope_theta": 1e6, **_present(raw), "rope_parameters": rope_of_kind(ropes, FULL)}
        of_sliding = {"rope_theta": _local_theta(raw), "rope_parameters": rope_of_kind(ropes, SLIDING)}
        full = attention_from_hf(raw, max_position=131_072, kv_heads=4, head_size=_HEAD_SIZE, rope_raw=of_full)
        config = _config(raw, "Gemma3ForCausalLM", replace(full, scale=_scale(raw), qk_norm="rms"), 131_072)
        config = replace(config, logit_softcap=_cap(raw, "final_logit_softcapping", None))
        every = hf_config.count(raw, "sliding_window_pattern", default=6)
        longest = hf_config.count(raw, "max_position_embeddings", default=131_072)
        return _with_windows(raw, config, every=every, rope=rope_from_hf(of_sliding, full.head_size, longest))


def _present(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rope's keys of older versions that are given."""
    given = {"rope_theta": raw.get("rope_theta"), "rope_scaling": rope_of_kind({FULL: raw.get("rope_scaling")}, FULL)}
    return {name: value for name, value in given.items() if value is not None}


def _local_theta(raw: Mapping[str, Any]) -> float:
    return hf_config.number(raw, "rope_local_base_freq", 1e4)


def _scale(raw: Mapping[str, Any]) -> float:
    return hf_config.number(raw, "query_pre_attn_scalar", 256.0) ** -0.5


def _cap(raw: Mapping[str, Any], name: str, default: float | None) -> float | None:
    """A cap; none where it is null."""
    if name not in raw or raw[name] is None:
        return None if name in raw else default
    return hf_config.number(raw, name, 1.0)


def _config(raw: Mapping[str, Any], architecture: str, attention: AttentionConfig, max_position: int) -> ModelConfig:
    bias = hf_config.flag(raw, "attention_bias", False)
    attention = replace(attention, qkv_bias=bias, dense_bias=bias)
    config = config_from_hf(raw, architecture, attention, max_position=max_position, bos=2, eos=1)
    key = "hidden_activation" if raw.get("hidden_activation") is not None else "hidden_act"
    return replace(
        config,
        activation=hf_config.activation(raw, key, "gelu_pytorch_tanh"),
        norm_offset=True,
        embedding_scale=config.hidden_size**0.5,
        tie_word_embeddings=hf_config.flag(raw, "tie_word_embeddings", True),
        pad_token_id=hf_config.token(raw, "pad_token_id", 0),
    )


def _with_windows(raw: Mapping[str, Any], config: ModelConfig, *, every: int, **sliding: Any) -> ModelConfig:
    """The configuration with its layers: one of `every` sees all, the others a window, with `sliding` as well."""
    kinds = layer_kinds(raw, [SLIDING if (layer + 1) % every else FULL for layer in range(config.num_layers)])
    window = hf_config.count(raw, "sliding_window", default=_WINDOW)
    return with_layers(config, kinds, window=window, **sliding)
