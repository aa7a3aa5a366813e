"""Families whose attention and MLP may stand side by side, and OLMo 2."""

from dataclasses import replace

from tests.models.families import Cases, Change, Model, with_attention, with_rope, with_window

ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 8}

MODELS: dict[str, Model] = {
    "neox": ("GPTNeoX", {"hidden_act": "gelu_new", "rope_parameters": ROPE}),
    "neox, a quarter turns, sequential": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "hidden_size": 64,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "layer_norm_eps": 1e-3,
        },
    ),
    "gptj": ("GPTJ", {}),
    "gptj, all of a head, relu, tied": (
        "GPTJ",
        {"rotary_dim": 12, "n_inner": 80, "activation_function": "relu", "tie_word_embeddings": True},
    ),
    "phi": ("Phi", {"rope_parameters": ROPE}),
    "phi, normed heads": ("Phi", {"qk_layernorm": True, "num_key_value_heads": 1, "num_attention_heads": 12}),
    "falcon 7b": ("Falcon", {"num_attention_heads": 12}),
    "falcon 40b": ("Falcon", FALCON_40B),
    "falcon 11b": ("Falcon", FALCON_40B | {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80, "bias": True}),
    "falcon rw": ("Falcon", FALCON_RW | {"tie_word_embeddings": False}),
    # as many heads as transformers has exact slopes for
    "falcon rw, 8 heads, parallel": ("Falcon", FALCON_RW | {"parallel_attn": True, "num_attention_heads": 8}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "rope_parameters": ROPE}),
    "stablelm, normed heads, parallel": (
        "StableLm",
        {"qk_layernorm": True, "use_parallel_residual": True, "hidden_size": 64, "tie_word_embeddings": True},
    ),
    "cohere": ("Cohere", {"logit_scale": 0.7}),
    "cohere, normed heads, biases": (
        "Cohere",
        {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5, "tie_word_embeddings": False},
    ),
    "cohere2": ("Cohere2", {"sliding_window": 7, "sliding_window_pattern": 3, "logit_scale": 0.7}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        },
    ),
}

CONTROLS: dict[str, tuple[str, Change]] = {
    "NeoX's parallel residual": ("neox", lambda config: replace(config, parallel_residual=False)),
    "NeoX's activation": ("neox", lambda config: replace(config, activation="gelu")),
    "half of NeoX's heads turns": ("neox", lambda config: with_rope(config, width=12)),
    "NeoX's theta": ("neox", lambda config: with_rope(config, theta=10_000.0)),
    "NeoX's parts one after the other": (
        "neox, a quarter turns, sequential",
        lambda config: replace(config, parallel_residual=True),
    ),
    "a quarter of NeoX's heads turns": (
        "neox, a quarter turns, sequential",
        lambda config: with_rope(config, width=16),
    ),
    "NeoX's epsilon": ("neox, a quarter turns, sequential", lambda config: replace(config, norm_eps=1e-5)),
    "neighbouring dimensions of GPT-J turn": ("gptj", lambda config: with_rope(config, interleaved=False)),
    "a part of GPT-J's heads turns": ("gptj", lambda config: with_rope(config, width=12)),
    "half of Phi's heads turns": ("phi", lambda config: with_rope(config, width=12)),
    "Falcon's rope": ("falcon 7b", lambda config: with_rope(config, theta=9_000.0)),
    "Falcon's activation": ("falcon 7b", lambda config: replace(config, activation="gelu_tanh")),
    "biases of ALiBi are scaled": ("falcon rw", lambda config: with_attention(config, alibi_scaled=False)),
    "half of StableLM's heads turns": ("stablelm", lambda config: with_rope(config, width=12)),
    "Cohere's logits": ("cohere", lambda config: replace(config, logit_scale=None)),
    "neighbouring dimensions of Cohere turn": ("cohere", lambda config: with_rope(config, interleaved=False)),
    "a token more in Cohere's window": ("cohere2", lambda config: with_window(config, 1)),
    "positions in Cohere's windows alone": (
        "cohere2",
        lambda config: replace(
            config,
            layer_attention=tuple(
                replace(layer, position="rope", rope=config.attention.rope) for layer in config.layer_attention
            ),
        ),
    ),
    "OLMo 3's ropes": ("olmo3", lambda config: with_rope(config, kind="default")),
    "a token more in OLMo 3's window": ("olmo3", lambda config: with_window(config, 1)),
    "OLMo's norms of all heads": ("olmo2", lambda config: with_attention(config, qk_norm="layer_by_head")),
}

WEIGHTS = {
    "NeoX's second norm": ("neox", "gpt_neox.layers.1.post_attention_layernorm.bias"),
    "NeoX's bias of attention": ("neox", "gpt_neox.layers.1.attention.dense.bias"),
    "NeoX's bias of the MLP": ("neox", "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"),
    "the bias of GPT-J's head": ("gptj", "lm_head.bias"),
    "Phi's bias of attention": ("phi", "model.layers.1.self_attn.dense.bias"),
    "Phi's norm of queries": ("phi, normed heads", "model.layers.1.self_attn.q_layernorm.weight"),
    "Phi's bias of queries' norm": ("phi, normed heads", "model.layers.1.self_attn.q_layernorm.bias"),
    "Phi's norm of keys": ("phi, normed heads", "model.layers.1.self_attn.k_layernorm.weight"),
    "the bias of Phi's head": ("phi", "lm_head.bias"),
    "Falcon's norm of the MLP": ("falcon 40b", "transformer.h.1.ln_mlp.weight"),
    "Falcon's bias of the MLP": ("falcon rw", "transformer.h.1.mlp.dense_4h_to_h.bias"),
    "StableLM's norm of a query head": (
        "stablelm, normed heads, parallel",
        "model.layers.1.self_attn.q_layernorm.norms.2.weight",
    ),
    "StableLM's norm of a key head": (
        "stablelm, normed heads, parallel",
        "model.layers.1.self_attn.k_layernorm.norms.1.weight",
    ),
    "Cohere's norms of keys": ("cohere, normed heads, biases", "model.layers.1.self_attn.k_norm.weight"),
    "OLMo's norms of queries": ("olmo2", "model.layers.1.self_attn.q_norm.weight"),
    "OLMo's norms of keys": ("olmo2", "model.layers.1.self_attn.k_norm.weight"),
    "OLMo's norm of what the MLP adds": ("olmo2", "model.layers.1.post_feedforward_layernorm.weight"),
}

CASES = Cases(
    models=MODELS,
    controls=CONTROLS,
    weights=WEIGHTS,
    served=["neox", "gptj", "falcon rw", "cohere2", "olmo3"],
    ranks=[
        ("gptj", 2),
        ("falcon 40b", 4),
        ("falcon rw", 2),
        ("stablelm, normed heads, parallel", 4),
        ("olmo2", 4),
    ],
    converted=[
        ("neox", 2),
        ("gptj", 1),
        ("falcon 40b", 4),
        ("stablelm, normed heads, parallel", 4),
        ("cohere, normed heads, biases", 2),
        ("olmo2", 4),
    ],
    leftovers={
        "neox": [
            f"gpt_neox.layers.{layer}.attention.{name}"
            for layer in range(3)
            for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        ],
        "gptj": [f"transformer.h.{layer}.attn.{name}" for layer in range(3) for name in ("bias", "masked_bias")],
    },
)
