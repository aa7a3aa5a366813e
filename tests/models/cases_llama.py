"""LLaMA and the families of its build."""

from dataclasses import replace
from typing import Any

from tests.models.families import Cases, Change, Model, with_attention, with_rope, with_window

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA2: dict[str, Any] = {
    "head_dim": 20,
    "sliding_window": 7,
    "query_pre_attn_scalar": 30,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
GEMMA3: dict[str, Any] = {
    "head_dim": 20,
    "sliding_window": 7,
    "query_pre_attn_scalar": 30,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    },
}
MODELS: dict[str, Model] = {
    "gemma": ("Gemma", {"head_dim": 20}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2, no caps": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", GEMMA3),
    "llama": ("Llama", {}),
    "llama, every head its own key": ("Llama", {"num_key_value_heads": 4}),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama, yarn rope": ("Llama", {"rope_parameters": YARN}),
    "llama, biases, tied, head size, gelu": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 16,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 20}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "phi3": (
        "Phi3",
        {
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3, all of it": (
        "Qwen3",
        {
            "head_dim": 8,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": YARN,
        },
    ),
    "seed-oss": ("SeedOss", {"head_dim": 20, "attention_out_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3, windows": (
        "SmolLM3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}


CONTROLS: dict[str, tuple[str, Change]] = {
    "one more than the weights of norms": ("gemma", lambda config: replace(config, norm_offset=False)),
    "the embedding's scale": ("gemma", lambda config: replace(config, embedding_scale=None)),
    "Gemma's gate": ("gemma", lambda config: replace(config, activation="gelu")),
    "Gemma 2's scale": ("gemma2", lambda config: with_attention(config, scale=None)),
    "capped scores": ("gemma2", lambda config: with_attention(config, softcap=None)),
    "capped logits": ("gemma2", lambda config: replace(config, logit_softcap=None)),
    "a token more in Gemma's window": ("gemma2", lambda config: with_window(config, 1)),
    "Gemma 2's layers": ("gemma2", lambda config: replace(config, layer_attention=(config.attention,) * 3)),
    "a token more in Gemma 3's window": ("gemma3", lambda config: with_window(config, 1)),
    "Gemma 3's ropes": ("gemma3", lambda config: with_rope(config, kind="default")),
    "positions": ("llama", lambda config: with_attention(config, position="none", rope=None)),
    "theta": ("llama", lambda config: with_rope(config, theta=9_000.0)),
    "scale": ("llama", lambda config: with_attention(config, scale=0.3)),
    "half of a head turns": ("llama", lambda config: with_rope(config, width=6)),
    "linear": ("llama, linear rope", lambda config: with_rope(config, kind="default")),
    "llama3": ("llama, one key head", lambda config: with_rope(config, kind="default")),
    "llama3's borders": ("llama, one key head", lambda config: with_rope(config, high_freq_factor=2.0)),
    "yarn": ("llama, yarn rope", lambda config: with_rope(config, kind="default")),
    "yarn's factor": ("llama, yarn rope", lambda config: with_rope(config, attention_factor=1.0)),
    "gate": ("llama", lambda config: replace(config, activation="gelu")),
    "gelu by tanh": ("llama, biases, tied, head size, gelu", lambda config: replace(config, activation="gelu_tanh")),
    "epsilon": ("llama, biases, tied, head size, gelu", lambda config: replace(config, norm_eps=1e-6)),
    "a token less in the window": ("mistral", lambda config: with_window(config, -1)),
    "a token more in the window": ("mistral", lambda config: with_window(config, 1)),
    "half of a Phi's head turns": ("phi3", lambda config: with_rope(config, width=12)),
    "a token more in a Phi's window": ("phi3", lambda config: with_window(config, 1)),
    "layers without positions": ("smollm3", lambda config: replace(config, layer_attention=())),
    "a token more in a SmolLM's window": ("smollm3, windows", lambda config: with_window(config, 1)),
    "windows in some layers": ("qwen2, windows", lambda config: replace(config, layer_attention=())),
    "a window in the first layer": (
        "qwen2, windows",
        lambda config: replace(config, layer_attention=(config.layer_attention[1],) * 3),
    ),
    "a token more in some windows": ("qwen3, all of it", lambda config: with_window(config, 1)),
}

WEIGHTS = {
    "norms of what attention adds": ("gemma2", "model.layers.1.post_attention_layernorm.weight"),
    "norms of what the MLP adds": ("gemma2", "model.layers.1.post_feedforward_layernorm.weight"),
    "norms of queries in Gemma": ("gemma3", "model.layers.1.self_attn.q_norm.weight"),
    "norms of queries": ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
    "norms of keys": ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
    "biases of queries": ("qwen2", "model.layers.1.self_attn.q_proj.bias"),
    "biases of values": ("qwen2", "model.layers.1.self_attn.v_proj.bias"),
    "Seed-OSS's biases of queries": ("seed-oss", "model.layers.1.self_attn.q_proj.bias"),
    "Seed-OSS's biases of the output": ("seed-oss", "model.layers.1.self_attn.o_proj.bias"),
    "biases of the output": ("llama, biases, tied, head size, gelu", "model.layers.1.self_attn.o_proj.bias"),
    "biases of the gate": ("llama, biases, tied, head size, gelu", "model.layers.1.mlp.gate_proj.bias"),
    "biases of the MLP's output": ("llama, biases, tied, head size, gelu", "model.layers.1.mlp.down_proj.bias"),
}

CASES = Cases(
    models=MODELS,
    controls=CONTROLS,
    weights=WEIGHTS,
    served=["llama, one key head", "gemma2", "mistral", "qwen2, windows", "qwen3, all of it", "smollm3, windows"],
    ranks=[("phi3", 4), ("gemma2", 2), ("qwen3, all of it", 4), ("llama, one key head", 2)],
    converted=[("qwen3, all of it", ranks) for ranks in (1, 2, 4)],
    leftovers={"llama": [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]},
)
