"""Mixtures of experts: Mixtral, Qwen 2 and Qwen 3."""

from dataclasses import replace
from typing import Any

from tests.models.families import Cases, Change, Model, with_window

from hasten.core.config import ModelConfig

MIXTRAL: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9}
QWEN: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN2 = QWEN | {"shared_expert_intermediate_size": 32}
MODELS: dict[str, Model] = {
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral, all experts see all": (
        "Mixtral",
        {"num_local_experts": 2, "num_experts_per_tok": 2, "tie_word_embeddings": True, "head_dim": 20},
    ),
    "qwen2 moe": ("Qwen2Moe", QWEN2),
    "qwen2 moe, windows, dense layers": (
        "Qwen2Moe",
        QWEN2
        | {
            "num_experts": 5,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "qwen3 moe": ("Qwen3Moe", QWEN | {"head_dim": 20}),
    "qwen3 moe, all of it": (
        "Qwen3Moe",
        QWEN
        | {
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "attention_bias": True,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
}


def with_experts(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.experts is not None
    return replace(config, experts=replace(config.experts, **changes))


CONTROLS: dict[str, tuple[str, Change]] = {
    "weights of experts that add up to 1": ("qwen3 moe", lambda config: with_experts(config, normalized=True)),
    "weights of experts that do not": ("mixtral", lambda config: with_experts(config, normalized=False)),
    "an expert less": ("mixtral", lambda config: with_experts(config, top_k=1)),
    "a token more in a Mixtral's window": ("mixtral", lambda config: with_window(config, 1)),
    "windows in every second layer": (
        "qwen2 moe, windows, dense layers",
        lambda config: replace(config, layer_attention=config.layer_attention[1:] + config.layer_attention[:1]),
    ),
    "windows in all layers": (
        "qwen3 moe, all of it",
        lambda config: replace(config, attention=replace(config.attention, window=None)),
    ),
}

WEIGHTS = {
    "the router": ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
    "an expert's gate": ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
    "an expert's other half": ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
    "an expert's output": ("qwen3 moe", "model.layers.1.mlp.experts.5.down_proj.weight"),
    "the expert that all tokens see": ("qwen2 moe", "model.layers.1.mlp.shared_expert.up_proj.weight"),
    "its own gate": ("qwen2 moe", "model.layers.1.mlp.shared_expert_gate.weight"),
}

CASES = Cases(
    models=MODELS,
    controls=CONTROLS,
    weights=WEIGHTS,
    served=["mixtral", "qwen2 moe, windows, dense layers", "qwen3 moe, all of it"],
    ranks=[("mixtral", 2), ("qwen2 moe", 2)],
    whole_experts=[("mixtral", 2), ("qwen2 moe", 2)],
    converted=[("qwen2 moe", 2)],
)
