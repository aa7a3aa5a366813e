"""Mixtures of experts: Mixtral, Qwen 2, Qwen 3 and gpt-oss."""

from dataclasses import replace
from typing import Any

from tests.models.families import Cases, Change, Model, with_rope, with_window

from hasten.core.model_config import ModelConfig

MIXTRAL: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9}
QWEN: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN2 = QWEN | {"shared_expert_intermediate_size": 32}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 4.0,
    "beta_fast": 3.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 31,
}
GPT_OSS: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "head_dim": 20,
    "sliding_window": 9,
    "rope_parameters": YARN,
}
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
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss, narrow limits, the rope of a silent config.json": (
        "GptOss",
        GPT_OSS
        | {
            "rope_parameters": None,
            "swiglu_limit": 0.6,
            "attention_bias": False,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


def with_experts(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.experts is not None
    return replace(config, experts=replace(config.experts, **changes))


NARROW = "gpt-oss, narrow limits, the rope of a silent config.json"
CONTROLS: dict[str, tuple[str, Change]] = {
    "weights of experts that add up to 1": ("qwen3 moe", lambda config: with_experts(config, normalized=True)),
    "weights of experts that do not": ("mixtral", lambda config: with_experts(config, normalized=False)),
    "an expert less": ("mixtral", lambda config: with_experts(config, top_k=1)),
    "a token more in a Mixtral's window": ("mixtral", lambda config: with_window(config, 1)),
    "windows in every second layer": (
        "qwen2 moe, windows, dense layers",
        lambda config: replace(config, layer_attention=config.layer_attention[1:] + config.layer_attention[:1]),
    ),
    "the other half without its offset": ("gpt-oss", lambda config: with_experts(config, offset=0.0)),
    "units without limits": (NARROW, lambda config: with_experts(config, limit=None)),
    "another factor of the gate": ("gpt-oss", lambda config: replace(config, activation="silu")),
    "weights of a gpt-oss's experts that do not add up to 1": (
        "gpt-oss",
        lambda config: with_experts(config, normalized=False),
    ),
    "a rope that ends at whole pairs": ("gpt-oss", lambda config: with_rope(config, truncate=True)),
    "a token more in a gpt-oss's window": ("gpt-oss", lambda config: with_window(config, 1)),
    "windows in the other layers of a gpt-oss": (
        "gpt-oss",
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
    "the sinks": ("gpt-oss", "model.layers.1.self_attn.sinks"),
    "the router's bias": ("gpt-oss", "model.layers.1.mlp.router.bias"),
    "gates and other halves": ("gpt-oss", "model.layers.1.mlp.experts.gate_up_proj"),
    "their biases": ("gpt-oss", "model.layers.1.mlp.experts.gate_up_proj_bias"),
    "outputs of experts": ("gpt-oss", "model.layers.1.mlp.experts.down_proj"),
    "the biases of these": ("gpt-oss", "model.layers.1.mlp.experts.down_proj_bias"),
    "the bias of attention's output": ("gpt-oss", "model.layers.1.self_attn.o_proj.bias"),
    "its own gate": ("qwen2 moe", "model.layers.1.mlp.shared_expert_gate.weight"),
}

CASES = Cases(
    models=MODELS,
    controls=CONTROLS,
    weights=WEIGHTS,
    served=["mixtral", "qwen2 moe, windows, dense layers", "qwen3 moe, all of it", "gpt-oss"],
    ranks=[("mixtral", 2), ("qwen2 moe", 2), ("gpt-oss", 2), ("gpt-oss", 4)],
    whole_experts=[("mixtral", 2), ("qwen2 moe", 2), ("gpt-oss", 4)],
    converted=[("qwen2 moe", 2), ("gpt-oss", 2)],
)
