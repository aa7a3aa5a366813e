"""GPT-2 and the families of its build."""

from dataclasses import replace

from tests.models.families import Cases, Change, Model, with_attention

from hasten.core.config import ModelConfig


def _same_layers(config: ModelConfig) -> ModelConfig:
    return replace(config, layer_attention=())


MODELS: dict[str, Model] = {
    "gpt2": ("GPT2", {}),
    "gpt2, inner size, own head, relu": (
        "GPT2",
        {"n_inner": 80, "tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ),
    "gpt2, scores scaled by layers": ("GPT2", {"scale_attn_by_inverse_layer_idx": True, "n_head": 12}),
    "gpt2, scores not scaled": ("GPT2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
}

CONTROLS: dict[str, tuple[str, Change]] = {
    "GPT-2's activation": ("gpt2", lambda config: replace(config, activation="gelu")),
    "GPT-2's epsilon": ("gpt2, inner size, own head, relu", lambda config: replace(config, norm_eps=1e-5)),
    "scales of layers": ("gpt2, scores scaled by layers", _same_layers),
    "no scale": ("gpt2, scores not scaled", lambda config: with_attention(config, scale=None)),
}

WEIGHTS = {
    "learned positions": ("gpt2", "transformer.wpe.weight"),
    **{
        f"GPT-2's {name}.{kind}": ("gpt2", f"transformer.h.1.{name}.{kind}")
        for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for kind in ("bias", "weight")
    },
}

CASES = Cases(
    models=MODELS,
    controls=CONTROLS,
    weights=WEIGHTS,
    served=["gpt2"],
    ranks=[("gpt2", 4), ("gpt2, inner size, own head, relu", 2)],
    converted=[("gpt2", ranks) for ranks in (1, 2, 4)],
    leftovers={
        "gpt2": [f"transformer.h.{layer}.attn.{name}" for layer in range(3) for name in ("bias", "masked_bias")],
    },
)
