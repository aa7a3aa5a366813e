import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from hasten.core.config import CacheConfig, EngineConfig, SchedulerConfig, engine_fields
from hasten.core.dtypes import dtype_name
from hasten.core.engine_options import EngineOptions
from hasten.core.errors import ConfigError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.core.option_fields import parse_size
from hasten.core.parallel_config import ParallelConfig
from hasten.core.vllm_arguments import WITHOUT_EFFECT

ATTENTION: dict[str, Any] = {"num_heads": 12, "num_kv_heads": 4, "head_size": 8}
MODEL: dict[str, Any] = {
    "architecture": "BloomForCausalLM",
    "num_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 384,
    "vocab_size": 509,
    "attention": AttentionConfig(**ATTENTION),
}


def test_core_imports_neither_torch_nor_a_server() -> None:
    code = (
        "import sys, hasten, hasten.core.config, hasten.core.errors, hasten.core.types\n"
        "assert hasten.SamplingParams and hasten.ConfigError\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'numpy', 'fastapi', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((text, "fp32") for text in ("fp32", "float32", "float", "torch.float32", "torch.float")),
        *((text, "fp16") for text in ("fp16", "float16", "half", "torch.float16", "torch.half")),
        *((text, "bf16") for text in ("bf16", "bfloat16", "torch.bfloat16")),
    ],
)
def test_aliases_of_data_types(text: str, name: str) -> None:
    assert dtype_name(text) == name


@pytest.mark.parametrize(
    "text", ["", "int8", "fp8", "FP32", "float64", "torch.", "torch.torch.float32", " fp16", "auto"]
)
def test_unknown_data_types_are_named_with_those_known(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dtype_name(text)
    assert str(caught.value) == f"data type {text!r} is not known; use one of fp32, fp16, bf16"


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        (AttentionConfig, ATTENTION, {"num_heads": 0}, "num_heads must be positive, got 0"),
        (AttentionConfig, ATTENTION, {"num_kv_heads": -4}, "num_kv_heads must be positive, got -4"),
        (AttentionConfig, ATTENTION, {"head_size": 0}, "head_size must be positive, got 0"),
        (AttentionConfig, ATTENTION, {"num_kv_heads": 5}, "num_heads 12 is not a multiple of num_kv_heads 5"),
        (AttentionConfig, ATTENTION, {"num_kv_heads": 24}, "num_heads 12 is not a multiple of num_kv_heads 24"),
        (ModelConfig, MODEL, {"num_layers": 0}, "num_layers must be positive, got 0"),
        (ModelConfig, MODEL, {"hidden_size": -96}, "hidden_size must be positive, got -96"),
        (ModelConfig, MODEL, {"intermediate_size": 0}, "intermediate_size must be positive, got 0"),
        (ModelConfig, MODEL, {"vocab_size": 0}, "vocab_size must be positive, got 0"),
        (ModelConfig, MODEL, {"layer_attention": (1,)}, "attention of 1 layers is given, but there are"),
        (ParallelConfig, {}, {"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
        (CacheConfig, {}, {"block_size": 0}, "block_size must be at least 1, got 0"),
        (
            CacheConfig,
            {},
            {"gpu_memory_utilization": 0.0},
            "gpu_memory_utilization must be above 0 and at most 1",
        ),
        (
            CacheConfig,
            {},
            {"gpu_memory_utilization": 1.01},
            "must be above 0 and at most 1, got 1.01",
        ),
        (CacheConfig, {}, {"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be above 0"),
        (CacheConfig, {}, {"kv_cache_memory": 0}, "kv_cache_memory must be positive, got 0"),
        (SchedulerConfig, {}, {"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        (SchedulerConfig, {}, {"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least 1, got 0"),
        (SchedulerConfig, {}, {"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
        (SchedulerConfig, {}, {"itl_target": -1.0}, "itl_target must be a number of milliseconds, 0 for no target"),
        (SchedulerConfig, {}, {"itl_target": float("nan")}, "itl_target must be a number of milliseconds, 0 for no"),
        (
            SchedulerConfig,
            {},
            {"max_num_seqs": 64, "max_num_batched_tokens": 63},
            "max_num_batched_tokens 63 is below max_num_seqs 64",
        ),
        (EngineConfig, {"model": "m"}, {"dtype": "int8"}, "data type 'int8' is not known"),
        (
            EngineConfig,
            {"model": "m"},
            {"device": "tpu"},
            "device 'tpu' is not known; use cpu, cuda, cuda:NUMBER or auto",
        ),
        (EngineConfig, {"model": "m"}, {"device": "cuda:"}, "device 'cuda:' is not known"),
        (EngineConfig, {"model": "m"}, {"device": "cpu "}, "device 'cpu ' is not known"),
        (EngineConfig, {"model": "m"}, {"quantization": "int3"}, "quantization 'int3' is not supported"),
        (
            EngineConfig,
            {"model": "m"},
            {"load_format": "gguf"},
            "load_format 'gguf' is not supported",
        ),
    ],
)
def test_bad_values_are_named(kind: type[Any], good: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    kind(**good)
    with pytest.raises(ConfigError) as caught:
        kind(**{**good, **bad})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CacheConfig, {"block_size": 1, "gpu_memory_utilization": 1.0, "kv_cache_memory": 1}),
        (SchedulerConfig, {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1}),
        (EngineConfig, {"model": "m", "dtype": "torch.bfloat16", "device": "cuda:11", "load_format": "dummy"}),
        (EngineConfig, {"model": "m", "quantization": "int8"}),
    ],
)
def test_values_at_the_edge_are_good(kind: type[Any], values: dict[str, Any]) -> None:
    result = kind(**values)
    assert {name: getattr(result, name) for name in values} == values


def test_configurations_cannot_be_changed() -> None:
    for result in (AttentionConfig(**ATTENTION), ModelConfig(**MODEL), EngineConfig(model="m"), CacheConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, dataclasses.fields(result)[0].name, 1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1, None),
        (4, None),
        (5, "tensor parallel size 5 does not divide attention heads (12)"),
        (6, "tensor parallel size 6 does not divide key/value heads (4); choose a size that does: 1, 2, 4, 12"),
        (12, None),
        (2, "tensor parallel size 2 does not divide the MLP's inner size (385)"),
    ],
)
def test_a_model_that_ranks_cannot_divide(size: int, message: str | None) -> None:
    model = ModelConfig(**{**MODEL, "intermediate_size": 385 if size == 2 else 384})
    if message is None:
        ParallelConfig(tensor_parallel_size=size).validate(model)
        return
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(tensor_parallel_size=size).validate(model)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "layers", "message"),
    [
        (3, None, None),
        (3, "1,1,1", None),
        (2, "2, 1", None),
        (4, None, "pipeline_parallel_size 4 is more than the 3 layers of the model"),
        (2, "2,2", "pipeline_layers 2,2 deals 4 layers, but the model has 3"),
        (2, "1,1,1", "pipeline_layers 1,1,1 is for 3 stages, pipeline_parallel_size is 2"),
        (2, "3,0", "pipeline_layers must be positive numbers separated by commas, as 10,11,11; got '3,0'"),
        (2, "3,", "pipeline_layers must be positive numbers separated by commas"),
        (0, None, "pipeline_parallel_size must be at least 1, got 0"),
    ],
)
def test_layers_that_stages_cannot_have(stages: int, layers: str | None, message: str | None) -> None:
    model = ModelConfig(**MODEL | {"num_layers": 3})
    if message is None:
        ParallelConfig(pipeline_parallel_size=stages, pipeline_layers=layers).validate(model)
        return
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(pipeline_parallel_size=stages, pipeline_layers=layers).validate(model)
    assert message in str(caught.value)


def test_layers_of_stages_as_python_has_them() -> None:
    created = EngineConfig.create("m", tensor_parallel_size=2, pipeline_parallel_size=3, pipeline_layers=[10, 11, 11])
    assert created.parallel == ParallelConfig(
        tensor_parallel_size=2, pipeline_parallel_size=3, pipeline_layers="10,11,11"
    )
    assert (created.parallel.dealt_layers, created.parallel.ranks) == ((10, 11, 11), 6)


def test_no_sequence_is_longer_than_a_model_has_positions() -> None:
    attention = AttentionConfig(**ATTENTION | {"position": "learned"})
    model = ModelConfig(**MODEL | {"attention": attention, "max_position_embeddings": 100, "position_offset": 2})
    assert model.num_positions == 102
    for length in (None, 100):
        SchedulerConfig(max_model_len=length).validate(model)
    with pytest.raises(ConfigError, match=r"^max_model_len 101 is more than the 100 positions .*; use at most 100$"):
        SchedulerConfig(max_model_len=101).validate(model)
    SchedulerConfig(max_model_len=101).validate(ModelConfig(**MODEL | {"max_position_embeddings": 100}))
    with pytest.raises(ConfigError, match="learned positions"):
        ModelConfig(**MODEL | {"attention": attention})


def test_flat_options_find_their_part() -> None:
    created = EngineConfig.create(
        "folder", tensor_parallel_size=2, block_size=32, max_model_len=100, dtype="fp16", seed=7, tokenizer=None
    )
    assert created == EngineConfig(
        model="folder",
        dtype="fp16",
        seed=7,
        parallel=ParallelConfig(tensor_parallel_size=2),
        cache=CacheConfig(block_size=32),
        scheduler=SchedulerConfig(max_model_len=100),
    )
    assert EngineConfig.create("folder") == EngineConfig(model="folder")


def test_names_of_vllm() -> None:
    given: dict[str, Any] = {"gpu_memory_utilization": 0.5, "enable_prefix_caching": False, "enforce_eager": True}
    given |= {"kv_cache_memory_bytes": 1000, "async_scheduling": True, "tokenizer": Path("there"), "seed": 3}
    created = EngineConfig.create("folder", **given)
    assert (created.cache.gpu_memory_utilization, created.cache.enable_prefix_caching) == (0.5, False)
    assert (created.cache.kv_cache_memory, created.scheduler.overlap_steps, created.enforce_eager) == (1000, True, True)
    assert (created.tokenizer, created.seed) == ("there", 3)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes and kv_cache_memory are one option"):
        EngineConfig.create("folder", kv_cache_memory=1, kv_cache_memory_bytes=1)


def test_none_is_what_is_left_out() -> None:
    assert EngineConfig.create("folder", **{f.name: None for f in engine_fields()}) == EngineConfig(model="folder")


@pytest.mark.parametrize("name", ["awq", "awq_marlin", "gptq", "compressed-tensors"])
def test_the_format_of_a_checkpoint_is_not_an_option(name: str) -> None:
    with pytest.raises(ConfigError, match=f"quantization='{name}' is not an option: a checkpoint in that format is"):
        EngineConfig.create("folder", quantization=name)


@pytest.mark.parametrize("model", [None, 5, b"folder"])
def test_a_model_has_a_name(model: Any) -> None:
    with pytest.raises(ConfigError, match="model must be a folder or a Hugging Face id, got "):
        EngineConfig.create(model)


def test_options_that_choose_nothing_are_accepted_where_they_ask_for_nothing_else() -> None:
    harmless: dict[str, Any] = {
        name: True if values is None else values[0] for name, (values, _) in WITHOUT_EFFECT.items()
    }
    assert EngineConfig.create("folder", **harmless) == EngineConfig(model="folder")
    for name, (values, reason) in WITHOUT_EFFECT.items():
        if values is not None:
            with pytest.raises(ConfigError) as caught:
                EngineConfig.create("folder", **cast("dict[str, Any]", {name: "other"}))
            assert str(caught.value) == f"{name}='other' is not supported: {reason}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "max_seqs",
            "unknown engine option max_seqs; did you mean max_num_seqs? there are block_size, deterministic, d",
        ),
        ("memory_utilization", "unknown engine option memory_utilization; did you mean gpu_memory_utilization? there"),
        ("quantisation", "unknown engine option quantisation; did you mean quantization? there are"),
        ("xyz", "unknown engine option xyz; there are block_size, deterministic, device, download_dir, dtype, enable_"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create("folder", **{name: 1})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("max_num_seqs", "8", "a whole number"),
        ("max_model_len", 2.5, "a whole number or None"),
        ("block_size", True, "a whole number"),
        ("tensor_parallel_size", "2", "a whole number"),
        ("gpu_memory_utilization", "0.5", "a number"),
        ("enable_prefix_caching", 1, "True or False"),
        ("overlap_steps", "yes", "True or False or None"),
        ("tokenizer", 5, "a text or None"),
        ("seed", "0", "a whole number"),
    ],
)
def test_a_value_of_another_kind_is_named(name: str, value: Any, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create("folder", **{name: value})
    assert str(caught.value) == f"{name} must be {kind}, got {value!r}"


def test_editors_know_every_option() -> None:
    aliases = {alias for f in engine_fields() for alias in f.metadata.get("aliases", ())}
    assert set(EngineOptions.__annotations__) == {f.name for f in engine_fields()} | aliases | set(WITHOUT_EFFECT)


def test_every_option_of_a_part_is_an_option_of_the_engine() -> None:
    parts = (ParallelConfig, CacheConfig, SchedulerConfig)
    names = [f.name for part in parts for f in dataclasses.fields(part)]
    names += [f.name for f in dataclasses.fields(EngineConfig)]
    assert len(set(names)) == len(names)
    defaults = {f.name: f.default for part in parts for f in dataclasses.fields(part)}
    assert EngineConfig.create("folder", **defaults) == EngineConfig(model="folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_paralel_size": 2}, "unknown engine option tensor_paralel_size"),
        ({"z": 1, "a": 2, "seed": 3}, "unknown engine option z"),
        ({"parallel": ParallelConfig()}, "unknown engine option parallel"),
        ({"cache": CacheConfig(), "block_size": 2}, "unknown engine option cache"),
    ],
)
def test_unknown_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create("folder", **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 1 << 30),
        ("1G", 1 << 30),
        ("1GiB", 1 << 30),
        ("1.5GB", 1_500_000_000),
        ("512 MiB", 512 << 20),
        ("0.5k", 512),
        ("2tb", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1X", "1Gi", "-1", "1e9", "1iB", "1.G", "1 G B", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a number of bytes; write it as 1073741824, 512MiB, 1G or 1\.5GB$"):
        parse_size(text)


def test_a_size_may_be_text() -> None:
    assert EngineConfig.create("folder", kv_cache_memory="1.5GB").cache.kv_cache_memory == 1_500_000_000
    assert EngineConfig.create("folder", kv_cache_memory_bytes="1G").cache.kv_cache_memory == 1 << 30
