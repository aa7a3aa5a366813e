"""gpt-oss: attention with sinks, a window in every second layer, and experts that are clamped gated units with biases.

Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, ExpertsConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.llama import (
    FULL,
    SLIDING,
    LlamaForCausalLM,
    attention_from_hf,
    config_from_hf,
    layer_kinds,
    weight_map_of,
    weights_before_mlp,
    with_layers,
)
from hasten.models.mixtral import MixtralBlock, MixtralForCausalLM
from hasten.models.weight_map import SAME, Axis, Init, Layout, StoredTensor, WeightMap, WeightSpec
from hasten.parallel.shard import Split

_MAX_POSITION, _KV_HEADS, _HEAD_SIZE, _WINDOW, _EPS = 131_072, 8, 64, 128, 1e-5
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""That of a config.json that names none."""
_ALPHA = 1.702
"""What the argument of the gate's sigmoid is multiplied by: that of `quick_gelu`."""


class GptOssForCausalLM(LlamaForCausalLM):
    """gpt-oss with its language model head."""

    block: ClassVar[type[nn.Module]] = MixtralBlock
    # published checkpoints repeat two settings under names of their own
    hf_harmless: ClassVar[frozenset[str]] = MixtralForCausalLM.hf_harmless | {
        "experts_per_token",
        "initial_context_length",
    }

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; layers 0, 2, 4, ... have a window unless `layer_types` says otherwise."""
        alpha = hf_config.number(raw, "swiglu_alpha", _ALPHA)
        if alpha != _ALPHA:
            raise UnsupportedError(f"swiglu_alpha {alpha} is not supported; supported is {_ALPHA}")
        config = config_from_hf(raw, "GptOssForCausalLM", _attention(raw), max_position=_MAX_POSITION)
        experts = ExpertsConfig(
            num_experts=hf_config.count(raw, "num_experts", "num_local_experts", default=128),
            top_k=hf_config.count(raw, "num_experts_per_tok", default=4),
            inner_size=config.intermediate_size,
            normalized=True,
            bias=True,
            limit=hf_config.number(raw, "swiglu_limit", 7.0),
            offset=1.0,
        )
        eps = hf_config.fraction(raw, "rms_norm_eps", _EPS)
        kinds = layer_kinds(raw, [FULL if layer % 2 else SLIDING for layer in range(config.num_layers)])
        window = hf_config.optional_count(raw, "sliding_window", _WINDOW)
        # published files are bf16, or MXFP4, which becomes that, and do not say so
        dtype = hf_config.dtype(raw) or "bf16"
        config = replace(config, norm_eps=eps, activation="quick_gelu", experts=experts, dtype=dtype)
        return with_layers(config, kinds, window=window)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return weight_map_of(config, partial(_of_layer, config))


def _attention(raw: Mapping[str, Any]) -> AttentionConfig:
    named = raw.get("rope_parameters") or raw.get("rope_scaling")
    attention = attention_from_hf(
        raw,
        max_position=_MAX_POSITION,
        kv_heads=_KV_HEADS,
        head_size=_HEAD_SIZE,
        rope_raw=None if named else {"rope_theta": raw.get("rope_theta"), "rope_parameters": _ROPE},
        theta=150_000.0,
    )
    bias = hf_config.flag(raw, "attention_bias", True)
    return replace(attention, qkv_bias=bias, dense_bias=bias, sinks=True)


def _halves(tensor: Tensor) -> Tensor:
    """Features of a gated unit along axis 1, with the two halves in turns, as one half after the other."""
    return torch.cat((tensor[:, 0::2], tensor[:, 1::2]), dim=1)


_IN_OUT = Layout(lambda tensor, _: tensor.transpose(1, 2))
"""That of stacked weights which are stored as (experts, in, out)."""
_IN_OUT_BY_TURNS = Layout(lambda tensor, _: _halves(tensor.transpose(1, 2)))
"""The same, with the features of gate and other half by turns."""
_BY_TURNS = Layout(lambda tensor, _: _halves(tensor))


_STORED: tuple[tuple[str, str, tuple[Axis, ...], tuple[Axis, ...], Layout, Split], ...] = (
    ("attention.sinks", "self_attn.sinks", ("heads",), ("heads",), SAME, Split.COLUMN),
    ("experts.router", "mlp.router.weight", ("experts", "hidden"), ("experts", "hidden"), SAME, Split.REPLICATE),
    ("experts.router_bias", "mlp.router.bias", ("experts",), ("experts",), SAME, Split.REPLICATE),
    (
        "experts.gate_up",
        "mlp.experts.gate_up_proj",
        ("experts", "hidden", "expert_gate_up"),
        ("experts", "expert_gate_up", "hidden"),
        _IN_OUT_BY_TURNS,
        Split.EXPERTS_GATE_UP,
    ),
    (
        "experts.gate_up_bias",
        "mlp.experts.gate_up_proj_bias",
        ("experts", "expert_gate_up"),
        ("experts", "expert_gate_up"),
        _BY_TURNS,
        Split.EXPERTS_GATE_UP,
    ),
    (
        "experts.down",
        "mlp.experts.down_proj",
        ("experts", "expert_inner", "hidden"),
        ("experts", "hidden", "expert_inner"),
        _IN_OUT,
        Split.EXPERTS_ROW,
    ),
    (
        "experts.down_bias",
        "mlp.experts.down_proj_bias",
        ("experts", "hidden"),
        ("experts", "hidden"),
        SAME,
        Split.EXPERTS_REPLICATE,
    ),
)
"""Of each layer: names of the parameter and of the stored tensor, axes of both, layout and split."""


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    yield from weights_before_mlp(config, layer)
    for own, theirs, stored, axes, layout, split in _STORED:
        source = StoredTensor(f"layers.{layer}.{theirs}", stored, layout)
        init: Init = "zeros" if own.endswith("bias") else "normal"
        yield WeightSpec(name=f"layers.{layer}.{own}", sources=(source,), axes=axes, split=split, init=init)
