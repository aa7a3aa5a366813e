"""config.json of GPT-2 and the families of its build, and the end of their positions."""

import json
from typing import Any

import pytest
from tests.conftest import MakeModel
from tests.models.conftest import BOUND, Worst
from transformers.models.mpt import modeling_mpt

from hasten import LLM, SamplingParams
from hasten.core.errors import ConfigError, InvalidRequestError, UnsupportedError
from hasten.models.hf_config import Fields
from hasten.models.registry import model_class

RAW: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 768, "n_layer": 4, "n_head": 12},
    "GPTBigCodeForCausalLM": {"n_embd": 768, "n_layer": 4, "n_head": 12},
    "GPTNeoForCausalLM": {"hidden_size": 768, "num_layers": 24, "num_heads": 12},
    "MptForCausalLM": {"d_model": 768, "n_layers": 4, "n_heads": 12},
    "OPTForCausalLM": {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "ffn_dim": 3072},
    "Starcoder2ForCausalLM": {
        "hidden_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
"""The keys without which a model has no shape."""


@pytest.mark.parametrize("architecture", RAW)
def test_what_a_config_leaves_out_is_as_in_hugging_face(architecture: str) -> None:
    import transformers

    reference = getattr(transformers, architecture).config_class(**RAW[architecture])
    found = model_class(architecture).config_from_hf(RAW[architecture])
    assert found.architecture == architecture
    # what a configuration that was saved says, and an old one without it
    saved = json.loads(reference.to_json_string(use_diff=False))
    assert model_class(architecture).config_from_hf(saved) == found
    assert found.vocab_size == reference.vocab_size
    assert found.attention.num_heads == reference.num_attention_heads
    longest = "max_seq_len" if architecture == "MptForCausalLM" else "max_position_embeddings"
    assert found.max_position_embeddings == getattr(reference, longest)


PUBLISHED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {
        "attn_pdrop": 0.1,
        "gradient_checkpointing": False,
        "n_ctx": 1024,
        "predict_special_tokens": True,
        "summary_type": "cls_index",
    },
    "GPTBigCodeForCausalLM": {"inference_runner": 0, "pad_key_length": True, "validate_runner_input": True},
    "GPTNeoForCausalLM": {"attention_layers": ["global", "local"] * 12, "resid_dropout": 0, "summary_use_proj": True},
    "MPTForCausalLM": {
        "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        "attn_config": {"attn_impl": "torch", "attn_pdrop": 0, "clip_qkv": 6, "qk_ln": False},
        "init_config": {"name": "kaiming_normal_"},
        "tokenizer_name": "EleutherAI/gpt-neox-20b",
        "verbose": 0,
    },
    "OPTForCausalLM": {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "do_layer_norm_before": False,
        "layerdrop": 0.0,
        "learned_embeddings": True,
        "prefix": "</s>",
        "word_embed_proj_dim": 512,
    },
    "Starcoder2ForCausalLM": {"mlp_type": "default", "norm_type": "layer_norm", "rope_theta": 999999.4420358813},
}
"""Keys that published checkpoints have and a new version of transformers does not write."""


@pytest.mark.parametrize(("architecture", "keys"), PUBLISHED.items(), ids=list(PUBLISHED))
def test_all_keys_of_published_checkpoints_are_known(architecture: str, keys: dict[str, Any]) -> None:
    cls = model_class(architecture)
    fields = Fields(RAW[architecture.replace("MPT", "Mpt")] | keys)
    cls.config_from_hf(fields)
    assert fields.unknown(cls.hf_harmless) == []


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("GPT2LMHeadModel", {"n_layer": None}, "lacks 'n_layer'"),
        ("GPT2LMHeadModel", {"n_head": 5}, "n_embd 768 is not a multiple of n_head 5"),
        ("GPT2LMHeadModel", {"activation_function": "tanh"}, "activation_function 'tanh' is not supported; "),
        ("GPT2LMHeadModel", {"n_positions": "all"}, "n_positions has a value of the wrong kind: 'all'"),
        ("GPT2LMHeadModel", {"n_inner": 0}, "n_inner has a value of the wrong kind: 0 is not a whole number above 0"),
        ("GPT2LMHeadModel", {"scale_attn_weights": "no"}, "scale_attn_weights has a value of the wrong kind"),
        ("GPTBigCodeForCausalLM", {"multi_query": "yes"}, "multi_query has a value of the wrong kind"),
        ("GPTNeoForCausalLM", {"attention_types": [[["global"], 3]]}, "has 3 layers, num_layers is 24"),
        ("GPTNeoForCausalLM", {"attention_types": [[["axial"], 24]]}, "attention_types has 'axial'; supported are glo"),
        ("GPTNeoForCausalLM", {"attention_types": "global"}, "attention_types 'global' is not a list of kinds and how"),
        ("GPTNeoForCausalLM", {"window_size": -1}, "window_size has a value of the wrong kind"),
        ("Starcoder2ForCausalLM", {"mlp_type": "gated"}, "mlp_type 'gated' is not supported; supported is default"),
        ("Starcoder2ForCausalLM", {"norm_epsilon": "tiny"}, "norm_epsilon has a value of the wrong kind"),
        ("Starcoder2ForCausalLM", {"sliding_window": 0}, "sliding_window has a value of the wrong kind"),
        ("MptForCausalLM", {"n_heads": 7}, "d_model 768 is not a multiple of n_heads 7"),
        ("MptForCausalLM", {"no_bias": False}, "no_bias False is not supported; supported is True"),
        ("MptForCausalLM", {"expansion_ratio": 2}, "expansion_ratio 2 is not supported; supported is 4"),
        ("MptForCausalLM", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale 'inv_sqrt_d_model' is not supported"),
        ("MptForCausalLM", {"norm_type": "rmsnorm"}, "norm_type 'rmsnorm' is not supported"),
        ("MptForCausalLM", {"attn_config": {"alibi": False}}, "attn_config: alibi False is not supported"),
        ("MptForCausalLM", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln True is not supported"),
        ("MptForCausalLM", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type 'multiquery_attention'"),
        ("MptForCausalLM", {"attn_config": {"flash_window": 4}}, "attn_config: flash_window is not supported"),
        ("MptForCausalLM", {"attn_config": {"clip_qkv": "6"}}, "attn_config: clip_qkv has a value of the wrong kind"),
        ("MptForCausalLM", {"attn_config": [1]}, "attn_config has a value of the wrong kind: [1] is not an object"),
        ("OPTForCausalLM", {"ffn_dim": None}, "lacks 'ffn_dim'"),
        ("OPTForCausalLM", {"num_attention_heads": 5}, "hidden_size 768 is not a multiple of num_attention_heads 5"),
        ("OPTForCausalLM", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False is not sup"),
        ("OPTForCausalLM", {"scale_embeddings": True}, "scale_embeddings True is not supported; supported is False"),
        ("OPTForCausalLM", {"do_layer_norm_before": 1}, "do_layer_norm_before has a value of the wrong kind"),
        ("OPTForCausalLM", {"word_embed_proj_dim": "512"}, "word_embed_proj_dim has a value of the wrong kind"),
    ],
)
def test_what_cannot_be_is_named_with_its_key(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        model_class(architecture).config_from_hf(RAW[architecture] | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_sequence_goes_past_the_table_of_positions(make_model: MakeModel) -> None:
    folder = make_model("GPT2")
    with pytest.raises(ConfigError, match=r"^max_model_len 129 is more than the 128 positions .*; use at most 128$"):
        LLM(folder, kv_cache_memory=1 << 22, max_model_len=129)
    with LLM(folder, kv_cache_memory=1 << 22, overlap_steps=True) as llm:
        assert llm.engine.max_model_len == 128
        endless = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
        outputs = llm.generate([[4] * 120, [5] * 127], endless)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 1]
        with pytest.raises(InvalidRequestError, match=r"128 \(max_model_len\)"):
            llm.generate([[4] * 128], endless)


def test_mpt_has_slopes_as_steep_as_its_configuration_says(
    make_model: MakeModel, worst_logit: Worst, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("Mpt", attn_config={"alibi_bias_max": 16})
    slopes = modeling_mpt.build_mpt_alibi_tensor
    # transformers reads the key, and then computes the model with 8
    monkeypatch.setattr(modeling_mpt, "build_mpt_alibi_tensor", lambda n, t, _, device: slopes(n, t, 16, device))
    assert worst_logit(folder, [1, 17, 70]) <= BOUND


@pytest.mark.parametrize("attention", [{"clip_qkv": None}, {"clip_qkv": 0}, {"rope": False, "rope_theta": 10000}, {}])
def test_what_is_off_in_mpt(attention: dict[str, Any]) -> None:
    plain = model_class("MptForCausalLM").config_from_hf(RAW["MptForCausalLM"])
    assert plain.attention.qkv_clip is None
    assert model_class("MptForCausalLM").config_from_hf(RAW["MptForCausalLM"] | {"attn_config": attention}) == plain
