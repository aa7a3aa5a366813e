import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from hasten.core.config import (
    AttentionConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    dtype_name,
)
from hasten.core.errors import ConfigError

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
        (ModelConfig, MODEL, {"hidden_size": 100}, "heads x head size = 96 differs from hidden_size 100"),
        (ParallelConfig, {}, {"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
        (CacheConfig, {}, {"block_size": 0}, "block_size must be at least 1, got 0"),
        (CacheConfig, {}, {"memory_utilization": 0.0}, "memory_utilization must be above 0 and at most 1, got 0.0"),
        (CacheConfig, {}, {"memory_utilization": 1.01}, "memory_utilization must be above 0 and at most 1, got 1.01"),
        (CacheConfig, {}, {"memory_utilization": float("nan")}, "memory_utilization must be above 0"),
        (CacheConfig, {}, {"kv_cache_memory": 0}, "kv_cache_memory must be positive, got 0"),
        (SchedulerConfig, {}, {"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        (SchedulerConfig, {}, {"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least 1, got 0"),
        (SchedulerConfig, {}, {"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
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
        (EngineConfig, {"model": "m"}, {"load_format": "gguf"}, "load_format 'gguf' is not auto or dummy"),
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
        (CacheConfig, {"block_size": 1, "memory_utilization": 1.0, "kv_cache_memory": 1}),
        (SchedulerConfig, {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1}),
        (EngineConfig, {"model": "m", "dtype": "torch.bfloat16", "device": "cuda:11", "load_format": "dummy"}),
    ],
)
def test_values_at_the_edge_are_good(kind: type[Any], values: dict[str, Any]) -> None:
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_configurations_cannot_be_changed() -> None:
    for made in (AttentionConfig(**ATTENTION), ModelConfig(**MODEL), EngineConfig(model="m"), CacheConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, dataclasses.fields(made)[0].name, 1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1, None),
        (4, None),
        (5, "tensor parallel size 5 does not divide attention heads (12)"),
        (6, "tensor parallel size 6 does not divide key/value heads (4)"),
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


def test_flat_options_find_their_part() -> None:
    made = EngineConfig.create(
        "folder", tensor_parallel_size=2, block_size=32, max_model_len=100, dtype="fp16", seed=7, tokenizer=None
    )
    assert made == EngineConfig(
        model="folder",
        dtype="fp16",
        seed=7,
        parallel=ParallelConfig(tensor_parallel_size=2),
        cache=CacheConfig(block_size=32),
        scheduler=SchedulerConfig(max_model_len=100),
    )
    assert EngineConfig.create("folder") == EngineConfig(model="folder")


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
        ({"z": 1, "a": 2, "seed": 3}, "unknown engine option a, z"),
        ({"parallel": ParallelConfig()}, "unknown engine option parallel"),
        ({"cache": CacheConfig(), "block_size": 2}, "unknown engine option cache"),
    ],
)
def test_unknown_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create("folder", **options)
    assert str(caught.value) == message
