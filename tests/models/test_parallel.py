"""config.json of the families with parallel residuals and of newer ones, and ALiBi in Falcon."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import MakeModel
from tests.models.cases_parallel import FALCON_RW
from tests.models.conftest import BOUND, Worst
from transformers.models.falcon import modeling_falcon

from hasten.checkpoint.ranked import _config_from_json
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.layers.position import alibi_slopes
from hasten.models.hf_config import Fields
from hasten.models.registry import architecture_of, model_class

WIDTHS = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {name: WIDTHS[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
RAW: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": WIDTHS | {"vocab_size": 256_000},
    "Cohere2ForCausalLM": WIDTHS | {"vocab_size": 256_000},
    "FalconForCausalLM": SMALL,
    "GPTJForCausalLM": {"n_embd": 768, "n_layer": 4, "n_head": 12},
    "GPTNeoXForCausalLM": WIDTHS | {"vocab_size": 50_432},
    "Olmo2ForCausalLM": WIDTHS | {"vocab_size": 50_304},
    "Olmo3ForCausalLM": WIDTHS | {"vocab_size": 50_304},
    "PhiForCausalLM": WIDTHS | {"vocab_size": 51_200},
    "SeedOssForCausalLM": WIDTHS | {"num_attention_heads": 32, "vocab_size": 155_136},
    "SmolLM3ForCausalLM": WIDTHS | {"vocab_size": 128_256},
    "StableLmForCausalLM": WIDTHS | {"num_attention_heads": 32, "vocab_size": 50_304},
}
"""The keys without which a model has no shape."""


@pytest.mark.parametrize("architecture", RAW)
def test_what_a_config_leaves_out_is_as_in_hugging_face(architecture: str) -> None:
    import transformers

    reference = getattr(transformers, architecture).config_class(**RAW[architecture])
    cls = model_class(architecture)
    found = cls.config_from_hf(RAW[architecture])
    assert found.architecture == architecture
    # what a configuration that was saved says, and an old one without it
    saved = Fields(json.loads(reference.to_json_string(use_diff=False)))
    assert cls.config_from_hf(saved) == found
    assert saved.unknown(cls.hf_harmless) == []
    names = ("vocab_size", "tie_word_embeddings", "bos_token_id", "pad_token_id", "max_position_embeddings")
    assert [getattr(found, name) for name in names] == [getattr(reference, name) for name in names]
    assert found.eos_token_ids == (reference.eos_token_id,)
    assert found.attention.num_heads == reference.num_attention_heads
    if architecture != "GPTJForCausalLM":
        assert found.attention.rope is not None
        rope = reference.rope_parameters
        assert found.attention.rope.theta == rope.get("full_attention", rope)["rope_theta"]
    for layer, kind in enumerate(getattr(reference, "layer_types", None) or ()):
        window = reference.sliding_window if kind == "sliding_attention" else None
        assert found.attention_of(layer).window == window


PUBLISHED: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {"model_max_length": 131_072, "pretraining_tp": 1, "rope_theta": 8e6},
    "Cohere2ForCausalLM": {
        "cache_implementation": "hybrid",
        "head_dim": 64,
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
    },
    "FalconForCausalLM": {
        "apply_residual_connection_post_layernorm": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"},
        "ff_factor": 4,
    },
    "GPTJForCausalLM": {"gradient_checkpointing": False, "rotary": True, "scale_attn_weights": True},
    "GPTNeoXForCausalLM": {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "rotary_emb_base": 10_000},
    "Olmo2ForCausalLM": {"rope_scaling": None, "rope_theta": 500_000},
    "Olmo3ForCausalLM": {
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500_000,
    },
    "PhiForCausalLM": {"embd_pdrop": 0.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "SeedOssForCausalLM": {"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e7},
    "SmolLM3ForCausalLM": {"max_window_layers": 28, "rope_scaling": None, "rope_theta": 5e6, "sliding_window": 4096},
    "StableLmForCausalLM": {"partial_rotary_factor": 0.25, "rotary_scaling_factor": 1.0},
}
"""Keys that published checkpoints have and a new version of transformers does not write."""


@pytest.mark.parametrize("architecture", RAW)
def test_all_keys_of_published_checkpoints_are_known(architecture: str) -> None:
    cls = model_class(architecture)
    raw = Fields(RAW[architecture] | PUBLISHED[architecture])
    cls.config_from_hf(raw)
    assert raw.unknown(cls.hf_harmless) == []


def test_the_keys_of_old_and_new_versions_mean_the_same() -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    old_names = {
        "GPTNeoXForCausalLM": {"rotary_emb_base": 500, "rotary_pct": 0.5},
        "PhiForCausalLM": {"rope_theta": 500, "partial_rotary_factor": 0.5},
        "StableLmForCausalLM": {"rope_theta": 500, "partial_rotary_factor": 0.5},
    }
    for architecture, old in old_names.items():
        cls, raw = model_class(architecture), RAW[architecture]
        assert cls.config_from_hf(raw | old) == cls.config_from_hf(raw | {"rope_parameters": rope})
    gptj = model_class("GPTJForCausalLM")
    named = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12}
    assert gptj.config_from_hf(named) == gptj.config_from_hf(RAW["GPTJForCausalLM"])


def test_falcons_of_before_transformers_knew_them() -> None:
    seven = {"architectures": ["RWForCausalLM"], "model_type": "RefinedWebModel", "multi_query": True}
    old = {"hidden_size": 768, "n_layer": 4, "n_head": 12, "parallel_attn": True}
    falcon = model_class(architecture_of(seven))
    assert architecture_of({"model_type": "RefinedWeb"}) == "FalconForCausalLM"
    assert falcon.config_from_hf(seven | old) == falcon.config_from_hf(SMALL | {"num_kv_heads": 12})
    forty = falcon.config_from_hf(old | {"n_head_kv": 4})
    assert forty == falcon.config_from_hf(SMALL | {"num_kv_heads": 4, "new_decoder_architecture": True})
    assert forty.attention.num_kv_heads == 4
    assert forty.mlp_norm


def test_the_longest_sequence_of_command_r_is_the_one_it_was_trained_for() -> None:
    cls, raw = model_class("CohereForCausalLM"), RAW["CohereForCausalLM"]
    assert cls.config_from_hf(raw | {"model_max_length": 131_072}).max_position_embeddings == 131_072


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("FalconForCausalLM", {"parallel_attn": False, "new_decoder_architecture": True}, "parallel_attn false is not"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 is not supported"),
        ("FalconForCausalLM", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post"),
        ("FalconForCausalLM", {"num_attention_heads": 7}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ("GPTJForCausalLM", {"rotary_dim": None}, "rotary_dim null is not supported"),
        ("GPTJForCausalLM", {"rotary_dim": 80}, "80 dimensions cannot turn in a head of 64"),
        ("GPTJForCausalLM", {"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
        ("GPTNeoXForCausalLM", {"num_attention_heads": 7}, "hidden_size 768 is not a multiple"),
        ("GPTNeoXForCausalLM", {"rotary_pct": "all"}, "rotary_pct has a value of the wrong kind"),
        ("Cohere2ForCausalLM", {"use_qk_norm": True}, "use_qk_norm is not supported in Cohere 2"),
        (
            "Cohere2ForCausalLM",
            {"position_embedding_type": "alibi"},
            "position_embedding_type 'alibi' is not supported",
        ),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layers": [1, 0]},
            r"no_rope_layers \[1, 0\] is not a list of 0 or 1 for each of 4",
        ),
        (
            "SmolLM3ForCausalLM",
            {"layer_types": ["sliding_attention"] * 4},
            "use_sliding_window and sliding_window give",
        ),
        ("Olmo3ForCausalLM", {"sliding_window": 0}, "sliding_window has a value of the wrong kind"),
        ("CohereForCausalLM", {"logit_scale": "big"}, "logit_scale has a value of the wrong kind"),
    ],
)
def test_what_cannot_be_is_named_with_its_key(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        model_class(architecture).config_from_hf(RAW[architecture] | changes)


def test_norms_of_heads_in_files_of_before_there_were_several_kinds(tmp_path: Path) -> None:
    config = model_class("Olmo2ForCausalLM").config_from_hf(RAW["Olmo2ForCausalLM"])
    for old, kind in ((True, "rms"), (False, None), ("layer", "layer")):
        raw = json.loads(json.dumps(asdict(config)))
        raw["attention"]["qk_norm"] = old
        assert _config_from_json(raw, tmp_path).attention.qk_norm == kind


def test_alibi_in_falcon_is_exact(make_model: MakeModel, worst_logit: Worst, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers rounds slopes to bf16, and biases from the 257th token on: its own values are then no measure."""
    folder = make_model("Falcon", **FALCON_RW | {"num_attention_heads": 12, "max_position_embeddings": 512})
    assert worst_logit(folder, [5, 33]) > 10 * BOUND

    def exact(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        positions = torch.arange(attention_mask.shape[1])
        return (alibi_slopes(num_heads).unsqueeze(1) * positions).unsqueeze(1).to(dtype)

    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", exact)
    assert worst_logit(folder, [4, 34, 300]) <= BOUND
