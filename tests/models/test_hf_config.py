import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hasten.checkpoint.hugging_face import read_hf_config
from hasten.core.errors import ConfigError, HastenError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.models import generation_config
from hasten.models.hf_config import Fields
from hasten.models.registry import architecture_of

BLOOM: dict[str, Any] = {"model_type": "bloom", "hidden_size": 96, "n_head": 12, "n_layer": 3, "vocab_size": 509}
PUBLISHED: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "pad_token_id": 3,
    "unk_token_id": 0,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pretraining_tp": 4,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "torch_dtype": "float16",
    "transformers_version": "4.20.0",
    "use_cache": True,
    "vocab_size": 250880,
}
"""Every key that the published BLOOMs have."""


def read(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return read_hf_config(folder)


def test_fields_remember_what_was_read() -> None:
    fields = Fields({"a": 1, "b": 2, "c": None, "d": 4, "model_type": "x"})
    assert (fields["a"], fields.get("nothing"), len(fields)) == (1, None, 5)
    assert fields.unknown({"d"}) == ["b"]


def test_a_published_config_is_known_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import BloomConfig

    assert read(tmp_path, PUBLISHED).hidden_size == 1024
    BloomConfig(**PUBLISHED).save_pretrained(tmp_path)
    assert read_hf_config(tmp_path).hidden_size == 1024
    assert not caplog.records


def test_unknown_keys_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, BLOOM | {"rope_theta": 1e4, "auto_map": {"AutoModel": "own.Model"}, "sliding_window": None})
    [record] = caplog.records
    assert (record.name, record.levelno) == ("hasten.checkpoint.hugging_face", logging.WARNING)
    path = tmp_path / "config.json"
    assert record.getMessage() == f"{path}: ignored, since hasten does not know what they change: auto_map, rope_theta"


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Gemma3Text", "Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"])
def test_what_transformers_writes_is_known_and_nothing_else(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")()
    config.save_pretrained(tmp_path)
    read_hf_config(tmp_path)
    assert not caplog.records
    read(tmp_path, json.loads(config.to_json_string(use_diff=False)) | {"strange": 1})
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["strange"]


def test_the_mode_that_leaves_biases_out_is_refused(tmp_path: Path) -> None:
    for raw in ({"slow_but_exact": True}, {"slow_but_exact": False, "pretraining_tp": 4}):
        assert read(tmp_path, BLOOM | raw) == read(tmp_path, BLOOM)
    with pytest.raises(UnsupportedError, match="slow_but_exact with pretraining_tp 4 is not supported; set"):
        read(tmp_path, BLOOM | {"slow_but_exact": True, "pretraining_tp": 4})


def test_a_bloom_without_a_vocabulary_size_has_that_of_transformers(tmp_path: Path) -> None:
    from transformers import BloomConfig

    found = read(tmp_path, {"model_type": "bloom", "n_layer": 24, "hidden_size": 1024, "n_head": 16})
    assert found.vocab_size == BloomConfig().vocab_size
    assert found.architecture == "BloomForCausalLM"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"n_layer": 24},
            r'has neither "architectures" nor "model_type", which say what the model is: take config.json from where',
        ),
        ({"architectures": []}, 'neither "architectures" nor "model_type"'),
        ({"architectures": "BloomForCausalLM"}, "architectures 'BloomForCausalLM' is not a list of names"),
        (
            {"model_type": "xglm"},
            r"model type 'xglm' is not supported; supported are bart, .*llama, .* \(docs/adding-a-model",
        ),
        (
            {"model_type": "xglm", "architectures": ["XGLMForCausalLM"]},
            r"architecture 'XGLMForCausalLM' is not supported; .* \(docs/adding-a-model\.md",
        ),
    ],
)
def test_an_architecture_that_is_missing_or_unknown(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HastenError, match=message) as caught:
        read(tmp_path, raw)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert isinstance(caught.value, ConfigError | UnsupportedError)


def test_what_transformers_writes_for_generation_is_known_whole() -> None:
    from transformers import GenerationConfig

    fresh = GenerationConfig()
    assert generation_config.not_applied(fresh.to_dict()) == []
    assert generation_config.not_applied(fresh._get_default_generation_params()) == []
    names = {name: 1 for name in vars(fresh) if not name.startswith("_")}
    assert generation_config.unknown(names) == []


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"suppress_tokens": [5], "repetition_penalty": 1.2}, ["repetition_penalty", "suppress_tokens"]),
        ({"forced_eos_token_id": 2, "no_repeat_ngram_size": 3}, ["no_repeat_ngram_size", "forced_eos_token_id"]),
        ({"temperature": 0.6, "top_p": 0.9}, []),
        ({"do_sample": True, "temperature": 0.6, "top_p": 1.0}, ["do_sample", "temperature"]),
        ({"max_length": 4096, "suppress_tokens": [], "repetition_penalty": 1.0, "top_k": 50}, []),
    ],
)
def test_settings_that_act_in_transformers_alone_are_named(
    raw: dict[str, Any], expected: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generation_config.not_applied(raw) == expected
    assert generation_config.unknown(raw | {"new_setting": 1, "use_cache": True}) == ["new_setting"]
    read(tmp_path, BLOOM | raw)  # where checkpoints of transformers 4 have them
    named = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert named == ([", ".join(expected)] if expected else [])


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("DeepseekV3ForCausalLM", "a model with latent attention"),
        ("OlmoeForCausalLM", "a mixture of experts of another build"),
        ("Llama4ForCausalLM", "a mixture of experts of another build"),
        ("Llama4ForConditionalGeneration", "a model of images and text"),
        ("Qwen3NextForCausalLM", "a model with recurrent layers"),
        ("GraniteMoeHybridForCausalLM", "a model with recurrent layers"),
        ("PegasusForConditionalGeneration", "an encoder-decoder"),
        ("ElectraModel", "an encoder of another build, or with another head"),
        ("LlamaForSequenceClassification", "a classifier of another build"),
        ("Qwen2VLForConditionalGeneration", "a model of images and text"),
        ("Gemma3ForConditionalGeneration", "a model of images and text"),
        ("MambaForCausalLM", "a model with recurrent layers"),
        ("XGLMForCausalLM", None),
        ("PersimmonForCausalLM", None),
    ],
)
def test_an_architecture_of_another_build_is_named_with_what_it_is(name: str, build: str | None) -> None:
    with pytest.raises(UnsupportedError) as caught:
        architecture_of({"architectures": [name]})
    shown = f"architecture {name!r} is" if build is None else f"architecture {name!r} ({build}) is"
    assert str(caught.value).startswith(f"{shown} not supported; supported are BartForConditionalGeneration, ")
