import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import LLM
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.checkpoint.plan import open_checkpoint, rank_tensors
from hasten.core.dtypes import QUANTIZATIONS
from hasten.core.errors import CapacityError, ConfigError
from hasten.core.model_config import ModelConfig
from hasten.engine.planning.footprint import footprint
from hasten.engine.planning.hardware import GPUS, Device, gpu, this_cpu
from hasten.engine.planning.plan import BATCHES, Planner, Setup, advice, others_use
from hasten.models.registry import model_class
from hasten.parallel.groups import ParallelGroups, TensorGroup
from hasten.parallel.threads import limit_threads
from hasten.quantization.scheme import SCHEMES, Quantizer

MakeModel = Callable[..., Path]
DEMO = Path(__file__).parents[3] / "examples" / "demo-model"
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Llama": {},
    "Bloom": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "OPT": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_tensors_of_each_rank(family: str, make_model: MakeModel) -> None:
    folder = make_model(family, **FAMILIES[family])
    for ranks in (1, 2):
        checkpoint = open_checkpoint(folder, ranks=ranks)
        with torch.device("meta"):
            groups = ParallelGroups(tensor=TensorGroup(0, ranks))
            model = model_class(checkpoint.config.architecture)(checkpoint.config, groups)
        for scheme in (None, *QUANTIZATIONS):
            quantizer = None if scheme is None else Quantizer(SCHEMES[scheme], model)
            expected = footprint(checkpoint.config, "fp32", ranks=ranks, quantization=scheme)
            for rank in range(ranks):
                held = 0
                for name, tensor in rank_tensors(checkpoint, rank, ranks, torch.float32):
                    assert isinstance(tensor, torch.Tensor)
                    held += (tensor if quantizer is None else quantizer(name, tensor)).nbytes
                assert expected.weight_bytes == held
            assert "other" not in expected.parts


@pytest.mark.parametrize("family", ["Llama", "Bloom", "Mixtral"])
def test_the_cache_is_the_one_that_an_engine_allocates(family: str, make_model: MakeModel) -> None:
    folder = make_model(family, **FAMILIES[family])
    with LLM(folder, device="cpu", kv_cache_memory="64KiB", max_num_seqs=4) as llm:
        blocks, runner, config = llm.engine.scheduler.blocks, llm.engine.worker.runner, llm.config
    block = footprint(config, "fp32").kv_bytes_per_token * blocks.block_size
    assert runner.block_bytes == block
    assert blocks.num_blocks == (64 << 10) // block


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bloom": {
        **{"architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 4096, "n_layer": 30},
        **{"n_head": 32, "vocab_size": 250880},
    },
    "llama": {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096},
        **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "hidden_act": "silu"},
        **{"tie_word_embeddings": False},
    },
    "llama 12": {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768},
        **{"intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
        **{"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu"},
        **{"tie_word_embeddings": False},
    },
    "qwen3_moe": {
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048},
        **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        **{"intermediate_size": 6144, "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True},
        **{"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "hidden_act": "silu"},
    },
}
MEASURED_MS = {
    "bloom": (3.65, 4.31, 5.70, 12.5),
    "llama": (4.09, 4.79, 5.25, 9.48),
    "qwen3_moe": (2.62, 11.2, 16.4, 20.1),
}
"""On an H200 with 192 tokens of context, at batch 1, 16, 64 and 256."""
INT8_MS = (2.56, 3.08, 4.92, 14.7)
"""The same of BLOOM with int8 weights."""


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[str], ModelConfig]:
    def read(shape: str) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape]))
        return read_hf_config(tmp_path)

    return read


@pytest.mark.parametrize("shape", MEASURED_MS)
def test_steps_are_within_a_fifth_of_what_was_measured(shape: str, model_of: Callable[[str], ModelConfig]) -> None:
    planner, setup = Planner(model_of(shape), gpu("H200")), Setup(dtype="bf16")
    steps = planner.decode(setup, 192)
    assert [step.tokens for step in steps] == list(BATCHES)
    for step, measured in zip(steps, MEASURED_MS[shape], strict=True):
        assert step.seconds * 1e3 == pytest.approx(measured, rel=0.2)
    assert steps[0].limit == "memory bandwidth (weights)"
    if shape == "llama":
        assert planner.prompts(setup, 16_384).tokens_per_second == pytest.approx(131_072 / 4.57, rel=0.2)
    if shape == "bloom":
        int8 = planner.decode(replace(setup, quantization="int8"), 192)
        assert [step.seconds * 1e3 for step in int8] == [pytest.approx(each, rel=0.2) for each in INT8_MS]
    halves = planner.decode(replace(setup, ranks=2), 192)
    assert all(0.4 < half.seconds / step.seconds < 1 for half, step in zip(halves, steps, strict=True))


CPU = Device(
    "CPU, 1 thread",
    16 << 30,
    24.9e9,
    97e9,
    is_gpu=False,
    cache_bytes=32 << 20,
    cached_bytes_per_second=90e9,
    has_kernels=True,
)
"""As one thread of Zen 4 cores was measured, by its CPU time, just before the steps."""
CPU_MS = {"llama 12": (80, {1: 21.6, 16: 48.8}), "demo": (144, {1: 0.435, 16: 3.48, 64: 11.7})}
"""Tokens of context, and ms of a step by batch."""


@pytest.mark.parametrize("model", CPU_MS)
def test_steps_of_a_cpu_with_kernels_are_within_a_fifth_of_what_was_measured(
    model: str, model_of: Callable[[str], ModelConfig]
) -> None:
    demo = model == "demo"
    device = replace(CPU, bytes_per_second=29.2e9, flops=99e9) if demo else CPU
    config = read_hf_config(DEMO) if demo else model_of(model)
    planner, setup, (context, measured) = Planner(config, device), Setup(dtype="fp32"), CPU_MS[model]
    found = {step.tokens: step for step in planner.decode(setup, context)}
    for batch, milliseconds in measured.items():
        assert found[batch].seconds * 1e3 == pytest.approx(milliseconds, rel=0.2)
    assert found[1].limit == "memory bandwidth (weights)"
    slower = Planner(config, replace(device, has_kernels=False)).decode(setup, context)
    assert all(torchs.seconds > found[torchs.tokens].seconds for torchs in slower)


def test_what_fits_where_something_does_not(model_of: Callable[[str], ModelConfig]) -> None:
    device = Device("small", 16 << 30, 1e12, 1e14)
    planner, setup = Planner(model_of("llama"), device), Setup(dtype="bf16", max_model_len=8192)
    assert list(planner.sizes(setup, 8)) == [1, 2, 4, 8]
    assert not planner.fit(setup).fits
    ways = planner.alternatives(setup, 8)
    assert ways == [{"tensor_parallel_size": 2}, {"quantization": "int8"}]
    assert planner.fit(replace(setup, ranks=2)).fits
    assert planner.fit(replace(setup, quantization="int8")).fits
    text = advice(planner, setup, 8)
    assert text.startswith("it needs 16.06 GB of weights as bf16, about ")
    assert text.endswith('of 17.18 GB; what fits: tensor_parallel_size 2, or quantization="int8"')
    roomy = Planner(planner.model, replace(device, memory=140 << 30))
    assert roomy.fit(setup).fits
    crowded = replace(setup, others=others_use(140 << 30, free=1 << 30, own=13 << 30))
    assert not roomy.fit(crowded).fits
    assert "of 150.32 GB of which other processes use 134.66 GB; `hasten plan`" in advice(roomy, crowded, 1)
    nowhere = Planner(planner.model, replace(device, memory=1 << 30))
    assert advice(nowhere, setup, 1).endswith("`hasten plan` shows what would do")


def test_a_length_that_does_not_fit(model_of: Callable[[str], ModelConfig]) -> None:
    planner = Planner(model_of("llama"), Device("little room", 20_100_000_000, 1e12, 1e14))
    setup = Setup(dtype="bf16", max_model_len=8192, utilization=0.93)
    assert not planner.fit(setup).fits
    shortened = planner.fit(replace(setup, max_model_len=None))
    assert shortened.fits
    assert shortened.max_model_len == shortened.cache_tokens < 8192
    assert {"max_model_len": shortened.max_model_len} in planner.alternatives(setup, 1)


def test_names_of_gpus() -> None:
    assert gpu("NVIDIA H100 80GB HBM3").name == "H100"
    assert gpu("NVIDIA A100-SXM4-40GB").name == "A100-40GB"
    assert gpu("4090").name == "RTX 4090"
    assert gpu("rtx4090").name == "RTX 4090"
    assert gpu("NVIDIA GH200 480GB").name == "GH200"
    assert gpu("h100pcie").name == "H100 PCIe"
    assert all(gpu(name).name == name for name in GPUS)
    for name in ("K80", "H1000", "MH100", "L400"):
        with pytest.raises(ConfigError, match=f"gpu '{name}' is not known; use one of B200, "):
            gpu(name)


def test_this_cpu_is_measured() -> None:
    before, device = limit_threads(), this_cpu()
    assert not device.is_gpu
    assert device.memory > 0
    assert 1e7 < device.bytes_per_second < 1e13
    assert 1e7 < device.cached_bytes_per_second < 1e14
    assert 0 <= device.cache_bytes < 1 << 40
    assert device.has_kernels
    assert 1e7 < device.flops < 1e14
    assert torch.get_num_threads() == before


def test_a_start_that_fails_for_memory_says_what_would_do(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engine.cache_setup.free_memory", lambda *_: 1)
    with pytest.raises(CapacityError, match=r"lower max_model_len or raise kv_cache_memory; it needs 0\.00 GB of weig"):
        LLM(tiny_bloom, device="cpu")


def allocated(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(1 << 60, dtype=torch.uint8)


def ran_out(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("failing", [allocated, ran_out])
@pytest.mark.parametrize(
    ("part", "doing"),
    [
        ("hasten.engine.worker.build_model", "loading the model"),
        ("hasten.engine.cache_setup.free_memory", "sizing the cache"),
        ("hasten.engine.runner.Runner.allocate_cache", "allocating the cache"),
    ],
)
def test_each_part_of_a_start_that_has_no_memory_gives_the_same_advice(
    part: str, doing: str, failing: Callable[..., object], tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, failing)
    with pytest.raises(CapacityError) as found:
        LLM(tiny_bloom, device="cpu")
    message = str(found.value)
    assert message.startswith(f"the device's memory ran out while {doing}; lower max_num_batched_tokens, ")
    assert "; it needs 0.00 GB of weights as fp32, about " in message


def test_other_errors_of_a_start_keep_their_own_words(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("hasten.engine.worker.build_model", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        LLM(tiny_bloom, device="cpu")
