"""BLOOM beside Hugging Face's own, in fp32. Shapes: t tokens, v vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import MakeBloom
from tests.models.conftest import BOUND, Worst

from hasten.checkpoint.hugging_face import read_hf_config
from hasten.core.errors import ConfigError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models.bloom import BloomForCausalLM

LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 70, 5]

MODELS: dict[str, dict[str, Any]] = {
    "8 heads": {},
    "12 heads": {"n_head": 12, "hidden_size": 96},
    "residual after the norm": {"apply_residual_connection_post_layernorm": True},
    "untied head": {"tie_word_embeddings": False},
    "odd vocabulary": {"vocab_size": 509},
    "all of it": {
        "n_head": 6,
        "hidden_size": 48,
        "vocab_size": 511,
        "tie_word_embeddings": False,
        "apply_residual_connection_post_layernorm": True,
        "layer_norm_epsilon": 1e-3,
    },
    "one layer, one head": {"n_layer": 1, "n_head": 1, "hidden_size": 24},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=list(MODELS))
def test_logits_are_those_of_hugging_face(options: dict[str, Any], make_bloom: MakeBloom, worst_logit: Worst) -> None:
    # all prompts in one step, and in steps so small that prompts are cut and stand beside decodes
    for budget in (2048, 21):
        worst = worst_logit(make_bloom(**options), LENGTHS, max_num_batched_tokens=budget, max_num_seqs=16)
        assert worst <= BOUND


HF: dict[str, Any] = {"hidden_size": 96, "n_head": 12, "n_layer": 3, "vocab_size": 509}


def test_a_config_of_hugging_face_is_read_whole() -> None:
    raw = HF | {
        "layer_norm_epsilon": 1e-3,
        "apply_residual_connection_post_layernorm": True,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 4,
        "eos_token_id": [5, 6],
        "pad_token_id": 7,
        "seq_length": 2048,
    }
    assert BloomForCausalLM.config_from_hf(raw) == ModelConfig(
        architecture="BloomForCausalLM",
        num_layers=3,
        hidden_size=96,
        intermediate_size=384,
        vocab_size=509,
        attention=AttentionConfig(num_heads=12, num_kv_heads=12, head_size=8),
        norm_eps=1e-3,
        residual_after_norm=True,
        tie_word_embeddings=False,
        dtype="bf16",
        bos_token_id=4,
        eos_token_ids=(5, 6),
        pad_token_id=7,
        max_position_embeddings=2048,
    )


def test_what_a_config_leaves_out_is_as_in_hugging_face() -> None:
    from transformers import BloomConfig

    found, reference = BloomForCausalLM.config_from_hf(HF), BloomConfig(**HF)
    assert found.norm_eps == reference.layer_norm_epsilon
    assert found.residual_after_norm == reference.apply_residual_connection_post_layernorm
    assert found.tie_word_embeddings == reference.tie_word_embeddings
    assert found.bos_token_id == reference.bos_token_id
    assert found.eos_token_ids == (reference.eos_token_id,)
    assert found.pad_token_id == reference.pad_token_id
    assert found.dtype == "fp32"
    assert found.max_position_embeddings is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("n_embed", "hidden_size"), ("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer")],
)
def test_old_names_of_keys(old: str, new: str) -> None:
    renamed = {old if name == new else name: value for name, value in HF.items()}
    assert BloomForCausalLM.config_from_hf(renamed) == BloomForCausalLM.config_from_hf(HF)
    # a key that is there but null counts as missing
    assert BloomForCausalLM.config_from_hf(renamed | {new: None}) == BloomForCausalLM.config_from_hf(HF)


def test_the_old_names_are_read_as_hugging_face_reads_them(tmp_path: Path) -> None:
    from transformers import BloomConfig

    raw = {"n_embed": 96, "num_attention_heads": 12, "num_hidden_layers": 3, "vocab_size": 509, "model_type": "bloom"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    found, reference = read_hf_config(tmp_path), BloomConfig(**raw)
    sizes = (found.hidden_size, found.attention.num_heads, found.num_layers)
    assert sizes == (reference.hidden_size, reference.n_head, reference.n_layer)


@pytest.mark.parametrize("name", sorted(set(HF) - {"vocab_size"}))
def test_a_missing_key_is_named(name: str) -> None:
    for raw in ({key: value for key, value in HF.items() if key != name}, HF | {name: None}):
        with pytest.raises(ConfigError, match=f"lacks '{name}'"):
            BloomForCausalLM.config_from_hf(raw)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(
            (name, ["many", 0, -1, 1.5, True, [8], {}])
            for name in (*HF, "n_embed", "num_attention_heads", "seq_length")
        ),
        ("layer_norm_epsilon", ["small", None, 0, -1e-5, 2.0, float("nan")]),
        ("apply_residual_connection_post_layernorm", ["false", 1]),
        ("tie_word_embeddings", ["false", 0, []]),
        ("dtype", ["int8", "float64", 16]),
        ("torch_dtype", ["int8"]),
        ("bos_token_id", ["<s>", 1.5, [1]]),
        ("eos_token_id", ["</s>", 2.5, [2, "</s>"], {}, True]),
        ("pad_token_id", ["<pad>", [3]]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            BloomForCausalLM.config_from_hf(HF | {name: value})
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    with pytest.raises(ConfigError, match="hidden_size 96 is not a multiple of n_head 7"):
        BloomForCausalLM.config_from_hf(HF | {"n_head": 7})


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HF | {"model_type": "bloom", "n_layer": "many"}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_hf_config(tmp_path)
    assert str(caught.value).startswith(f"{path}: n_layer ")
