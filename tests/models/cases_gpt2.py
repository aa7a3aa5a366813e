"""GPT-2 and the families of its build."""

from dataclasses import replace

from tests.models.families import Cases, Change, Model, with_attention, with_rope, with_window

from hasten.core.model_config import ModelConfig


def _same_layers(config: ModelConfig) -> ModelConfig:
    return replace(config, layer_attention=())


ROPE = {"rope_type": "default", "rope_theta": 500.0}
MODELS: dict[str, Model] = {
    "gpt2": ("GPT2", {}),
    "gpt2, inner size, own head, relu": (
        "GPT2",
        {"n_inner": 80, "tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ),
    "gpt2, scores scaled by layers": ("GPT2", {"scale_attn_by_inverse_layer_idx": True, "n_head": 12}),
    "gpt2, scores not scaled": ("GPT2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    "opt": ("OPT", {}),
    "opt, 350m": ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt, narrow embeddings": ("OPT", {"word_embed_proj_dim": 20, "tie_word_embeddings": False}),
    "opt, no biases, no final norm": (
        "OPT",
        {"enable_bias": False, "_remove_final_layer_norm": True, "activation_function": "gelu"},
    ),
    "gpt bigcode": ("GPTBigCode", {"n_inner": 80}),
    "gpt bigcode, every head its own key": ("GPTBigCode", {"multi_query": False, "tie_word_embeddings": False}),
    "gpt bigcode, scores not scaled": ("GPTBigCode", {"scale_attn_weights": False}),
    "gpt neo": ("GPTNeo", {}),
    "gpt neo, inner size, own head": ("GPTNeo", {"intermediate_size": 80, "tie_word_embeddings": False}),
    "mpt": ("Mpt", {"n_heads": 12}),
    "mpt, clipped, scale, own head": (
        "Mpt",
        {"attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.4}, "tie_word_embeddings": False},
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": 9, "rope_parameters": ROPE}),
    "starcoder2, no biases, own head": (
        "Starcoder2",
        {"use_bias": False, "tie_word_embeddings": False, "num_key_value_heads": 1, "norm_epsilon": 1e-3},
    ),
}

CONTROLS: dict[str, tuple[str, Change]] = {
    "GPT-2's activation": ("gpt2", lambda config: replace(config, activation="gelu")),
    "GPT-2's epsilon": ("gpt2, inner size, own head, relu", lambda config: replace(config, norm_eps=1e-5)),
    "scales of layers": ("gpt2, scores scaled by layers", _same_layers),
    "no scale": ("gpt2, scores not scaled", lambda config: with_attention(config, scale=None)),
    "OPT's first row of positions": (
        "opt",
        lambda config: replace(config, position_offset=1, max_position_embeddings=129),
    ),
    "norms of OPT 350m": ("opt, 350m", lambda config: replace(config, norm_first=True)),
    "OPT's activation": ("opt", lambda config: replace(config, activation="gelu")),
    "BigCode's scale": ("gpt bigcode, scores not scaled", lambda config: with_attention(config, scale=None)),
    "Neo's scale": ("gpt neo", lambda config: with_attention(config, scale=None)),
    "Neo's layers": ("gpt neo", lambda config: replace(config, layer_attention=())),
    "a token more in Neo's window": ("gpt neo", lambda config: with_window(config, 1)),
    "a token less in Neo's window": ("gpt neo", lambda config: with_window(config, -1)),
    "MPT's positions": ("mpt", lambda config: with_attention(config, position="none")),
    "MPT's slopes": ("mpt", lambda config: with_attention(config, alibi_bias_max=7.0)),
    "MPT's activation": ("mpt", lambda config: replace(config, activation="gelu_tanh")),
    "MPT's clip": ("mpt, clipped, scale, own head", lambda config: with_attention(config, qkv_clip=None)),
    "MPT's scale": ("mpt, clipped, scale, own head", lambda config: with_attention(config, scale=None)),
    "StarCoder 2's rope": ("starcoder2", lambda config: with_rope(config, theta=9_000.0)),
    "a token more in StarCoder 2's window": ("starcoder2", lambda config: with_window(config, 1)),
    "StarCoder 2's epsilon": ("starcoder2, no biases, own head", lambda config: replace(config, norm_eps=1e-5)),
}

_OPT_WEIGHTS = (
    "embed_positions.weight",
    "final_layer_norm.bias",
    "layers.1.self_attn_layer_norm.weight",
    "layers.1.final_layer_norm.weight",
    "layers.1.self_attn.q_proj.bias",
    "layers.1.self_attn.v_proj.bias",
    "layers.1.self_attn.out_proj.bias",
    "layers.1.fc1.bias",
    "layers.1.fc2.bias",
)
WEIGHTS = {
    "learned positions": ("gpt2", "transformer.wpe.weight"),
    **{
        f"GPT-2's {name}.{kind}": ("gpt2", f"transformer.h.1.{name}.{kind}")
        for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for kind in ("bias", "weight")
    },
    "BigCode's fused projection": ("gpt bigcode", "transformer.h.1.attn.c_attn.bias"),
    "MPT's norms": ("mpt", "transformer.blocks.1.norm_2.weight"),
    "MPT's last norm": ("mpt", "transformer.norm_f.weight"),
    "Neo's positions": ("gpt neo", "transformer.wpe.weight"),
    "Neo's output projection": ("gpt neo", "transformer.h.1.attn.attention.out_proj.bias"),
    "StarCoder 2's norms": ("starcoder2", "model.layers.1.input_layernorm.bias"),
    "StarCoder 2's biases of keys and values": ("starcoder2", "model.layers.1.self_attn.v_proj.bias"),
    "StarCoder 2's MLP": ("starcoder2", "model.layers.1.mlp.c_fc.bias"),
    "StarCoder 2's last norm": ("starcoder2", "model.norm.bias"),
    **{f"OPT's {name}": ("opt", f"model.decoder.{name}") for name in _OPT_WEIGHTS},
    "OPT's projection of embeddings": ("opt, 350m", "model.decoder.project_in.weight"),
    "OPT's projection to the head": ("opt, 350m", "model.decoder.project_out.weight"),
    "norms behind the MLPs of OPT 350m": ("opt, 350m", "model.decoder.layers.2.final_layer_norm.bias"),
}

CASES = Cases(
    models=MODELS,
    controls=CONTROLS,
    weights=WEIGHTS,
    served=["gpt2", "opt, 350m", "gpt bigcode", "gpt neo", "mpt", "starcoder2"],
    ranks=[
        ("gpt2, inner size, own head, relu", 2),
        ("opt, 350m", 2),
        ("gpt bigcode", 4),
        ("gpt neo", 2),
        ("mpt", 4),
        ("starcoder2", 2),
    ],
    converted=[
        ("gpt2", 2),
        ("opt, 350m", 4),
        ("opt, narrow embeddings", 1),
        ("gpt bigcode", 4),
        ("gpt bigcode, every head its own key", 2),
        ("gpt neo", 1),
        ("mpt, clipped, scale, own head", 2),
        ("starcoder2", 4),
    ],
    leftovers={
        "gpt bigcode": ["transformer.h.0.attn.bias"],
        "gpt neo": [
            f"transformer.h.{layer}.attn.attention.{name}" for layer in range(3) for name in ("bias", "masked_bias")
        ],
        "starcoder2": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        "opt": ["model.decoder.version"],
        "gpt2": [f"transformer.h.{layer}.attn.{name}" for layer in range(3) for name in ("bias", "masked_bias")],
    },
)
