"""A request's tokens and log-probabilities, bit by bit, whatever else the engine computes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import LLM, ConfigError, RequestOutput, SamplingParams
from hasten.ops.gpu import library

pytestmark = pytest.mark.any_python

MakeModel = Callable[..., Path]
Answer = list[Any]
"""What must not change: prompt log-probabilities, and of each completion tokens, its and their log-probabilities."""

LENGTHS = (1, 3, 15, 16, 17, 33, 70, 150)
BEAMS = SamplingParams(beam_width=3, n=3, max_tokens=6)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=7, n=2, max_tokens=10, logprobs=2, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
SCORED = SamplingParams(temperature=0, max_tokens=3, logprobs=1, prompt_logprobs=2, ignore_eos=True)
KINDS = (GREEDY, SAMPLED, SCORED, BEAMS)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"n_layer": 2}),
    "llama": ("Llama", {"num_hidden_layers": 2, "intermediate_size": 72}),
    "qwen3 moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "head_dim": 16,
        },
    ),
    "gemma2": ("Gemma2", {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 24}),
}
OPTIONS: dict[str, Any] = {"deterministic": True, "max_model_len": 256, "max_num_seqs": 16, "progress_bars": False}
ON_CPU = [
    ("bloom", "fp32", "auto"),
    ("llama", "fp32", "int8"),
    ("qwen3 moe", "fp32", "auto"),
    ("gemma2", "fp32", "fp8"),
    ("bloom", "bf16", "auto"),
    ("qwen3 moe", "bf16", "auto"),
]
"""Model, type to compute in, type of the cache."""
ON_GPU = [
    *(("bloom", "fp16", cache) for cache in ("auto", "fp8")),
    ("llama", "bf16", "auto"),
    ("qwen3 moe", "fp16", "int8"),
    ("gemma2", "bf16", "auto"),
    ("bloom", "fp32", "auto"),
]


def answer(output: RequestOutput) -> Answer:
    completions = [(c.token_ids, c.cumulative_logprob, c.logprobs) for c in output.outputs]
    return [output.prompt_logprobs, completions]


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of all lengths, some with a common prefix, in all kinds of requests."""
    rng = random.Random(5)
    shared = [rng.randrange(4, 400) for _ in range(48)]
    prompts = [[rng.randrange(4, 400) for _ in range(length)] for length in LENGTHS]
    prompts += [shared + [rng.randrange(4, 400) for _ in range(length)] for length in (2, 20)]
    return [(prompt, KINDS[number % len(KINDS)]) for number, prompt in enumerate(prompts)]


REQUESTS = requests()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Threads that share a sum must do so in one order, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    llm = LLM(folder, **{**OPTIONS, **options})
    try:
        yield llm
    finally:
        llm.close()


def together(llm: LLM, order: list[int]) -> list[Answer]:
    outputs = llm.generate([REQUESTS[i][0] for i in order], [REQUESTS[i][1] for i in order])
    answers = dict(zip(order, map(answer, outputs), strict=True))
    return [answers[i] for i in range(len(order))]


def alone(llm: LLM) -> list[Answer]:
    return [answer(llm.generate([prompt], params)[0]) for prompt, params in REQUESTS]


def shuffled() -> list[int]:
    return random.Random(1).sample(range(len(REQUESTS)), len(REQUESTS))


def assert_same(expected: list[Answer], found: list[Answer], where: str) -> None:
    for number, (own, other) in enumerate(zip(expected, found, strict=True)):
        assert own == other, f"request {number} {where}"


def check(folder: Path, **options: Any) -> None:
    with engine(folder, **options, enable_prefix_caching=False) as llm:
        expected = alone(llm)
        assert_same(expected, together(llm, shuffled()), "among others")
    with engine(folder, **options) as llm:
        assert_same(expected, together(llm, list(range(len(REQUESTS)))), "with a prefix of the same step")
        assert_same(expected, together(llm, shuffled()), "with a warm prefix cache")
        assert_same(expected, alone(llm), "alone with a warm prefix cache")
        assert llm.engine.scheduler.blocks.prefix_hits > 0
    with engine(folder, **{**options, "max_num_batched_tokens": 16, "block_size": 8}) as llm:
        assert_same(expected, together(llm, shuffled()), "in chunks")


@pytest.mark.parametrize(("name", "dtype", "cache"), ON_CPU)
def test_company_changes_no_bit(name: str, dtype: str, cache: str, make_model: MakeModel) -> None:
    family, config = MODELS[name]
    check(make_model(family, **config), device="cpu", dtype=dtype, kv_cache_dtype=cache)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "cache"), ON_GPU)
def test_company_changes_no_bit_on_a_gpu(name: str, dtype: str, cache: str, make_model: MakeModel) -> None:
    family, config = MODELS[name]
    folder = make_model(family, **config)
    options = {"device": "cuda", "dtype": dtype, "kv_cache_memory": 64 << 20, "max_num_batched_tokens": 256}
    options["kv_cache_dtype"] = cache
    check(folder, **options)
    with engine(folder, **options) as graphs, engine(folder, **options, enforce_eager=True) as eager:
        assert_same(alone(graphs), alone(eager), "without graphs")


def check_ranks(folder: Path, blocks: int, **options: Any) -> None:
    """Alone on two ranks, and among others in chunks, with a warm prefix cache and after preemptions."""
    options = {**options, "tensor_parallel_size": 2}
    with engine(folder, **options, enable_prefix_caching=False) as llm:
        expected = alone(llm)
        block_bytes = llm.engine.worker.runner.block_bytes
    tight = {"kv_cache_memory": blocks * block_bytes, "max_num_batched_tokens": 128}
    with engine(folder, **{**options, **tight}) as llm:
        for where in ("in chunks", "in chunks, with a warm prefix cache"):
            assert_same(expected, together(llm, shuffled()), where)
        assert llm.engine.scheduler.stats.preemptions > 0
        assert llm.engine.scheduler.blocks.prefix_hits > 0


@pytest.mark.any_python
def test_company_changes_no_bit_on_two_ranks(make_model: MakeModel) -> None:
    family, config = MODELS["qwen3 moe"]
    check_ranks(make_model(family, **config), 24, device="cpu", dtype="fp32")


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("name", "dtype"), [("bloom", "fp16"), ("llama", "bf16"), ("qwen3 moe", "fp16"), ("bloom", "fp32")]
)
def test_company_changes_no_bit_on_two_gpus(name: str, dtype: str, make_model: MakeModel) -> None:
    family, config = MODELS[name]
    folder = make_model(family, **config)
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype, "max_num_seqs": 128, "tensor_parallel_size": 2}
    options["kv_cache_memory"] = 64 << 20
    check_ranks(folder, 24, **options)
    rng = random.Random(3)
    crowd = [[rng.randrange(4, 400) for _ in range(rng.randrange(1, 60))] for _ in range(110)]
    prompts, params = [prompt for prompt, _ in REQUESTS], [each for _, each in REQUESTS]
    with engine(folder, **options, enable_prefix_caching=False) as llm:
        expected = alone(llm)
        outputs = llm.generate([*crowd, *prompts], [GREEDY] * len(crowd) + params)[len(crowd) :]
        assert_same(expected, [answer(output) for output in outputs], "among 110 others")
    with engine(folder, **options, enforce_eager=True) as llm:
        assert_same(expected, alone(llm), "without graphs")


@pytest.mark.gpu
def test_a_crowd_changes_no_bit_on_a_gpu(make_model: MakeModel) -> None:
    rng = random.Random(3)
    crowd = [[rng.randrange(4, 400) for _ in range(rng.randrange(1, 120))] for _ in range(240)]
    options = {"device": "cuda", "dtype": "fp16", "max_num_seqs": 256, "enable_prefix_caching": False}
    with engine(make_model("Bloom", n_head=8, hidden_size=1024, n_layer=2, initializer_range=0.05), **options) as llm:
        llm.engine.prepare()  # products are compared as steps of their numbers of rows are captured
        agreed = {key[-1] for key, equal in library._agreed.items() if equal}
        assert {96, 256, 512, 1024} <= agreed, "the library's products were not compared, or all have other bits"
        expected = alone(llm)
        prompts, params = zip(*REQUESTS, strict=True)
        found = llm.generate([*crowd, *prompts], [GREEDY] * len(crowd) + list(params))[len(crowd) :]
        assert_same(expected, [answer(output) for output in found], "among 240 others")


def test_a_preemption_changes_no_bit(make_model: MakeModel) -> None:
    family, config = MODELS["llama"]
    folder = make_model(family, **config)
    prompts = [prompt[:40] for prompt, _ in REQUESTS]
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=2, ignore_eos=True)
    with engine(folder) as llm:
        expected = [answer(llm.generate([prompt], params)[0]) for prompt in prompts]
        block_bytes = llm.engine.worker.runner.block_bytes
    with engine(folder, kv_cache_memory=16 * block_bytes) as llm:
        found = [answer(output) for output in llm.generate(prompts, params)]
        assert llm.engine.scheduler.stats.preemptions > 0
    assert_same(expected, found, "after preemptions")


def test_without_the_option_company_does_change_bits(make_model: MakeModel) -> None:
    family, config = MODELS["bloom"]
    folder = make_model(family, **config)
    with engine(folder, deterministic=False, enable_prefix_caching=False) as llm:
        assert alone(llm) != together(llm, shuffled())


def test_threads_of_one_engine_are_not_part_of_a_request(make_model: MakeModel) -> None:
    family, config = MODELS["bloom"]
    folder = make_model(family, **config)
    before = torch.get_num_threads()
    with engine(folder) as llm:
        expected = alone(llm)
        torch.set_num_threads(1)
        try:
            assert_same(expected, together(llm, shuffled()), "with a single thread")
        finally:
            torch.set_num_threads(before)


def test_what_has_no_fixed_order_is_refused(tiny_bloom: Path) -> None:
    reason = "products with int8 weights have no fixed order; use full precision"
    with pytest.raises(ConfigError, match=f"^deterministic: {reason}$"):
        LLM(tiny_bloom, deterministic=True, quantization="int8")
