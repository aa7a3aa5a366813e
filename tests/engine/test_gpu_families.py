"""GPT-2's families and mixtures of experts on a GPU and on the CPU: equal greedy tokens in fp32, half types near it."""

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import MakeModel
from tests.engine_logits import DECODED, engine_logits
from tests.models import cases_experts, cases_gpt2

from hasten import LLM, SamplingParams

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LENGTHS = (1, 2, 7, 16, 17, 33, 40, 70, 110)
PROMPTS = [[(13 * length + 7 * index) % 480 + 4 for index in range(length)] for length in LENGTHS]
LONGER = [[(13 * index) % 480 + 4 for index in range(300)]]
LIMITS: dict[str, Any] = {"kv_cache_memory": 64 << 20, "max_num_seqs": 16}
MODELS = {**cases_gpt2.MODELS, **cases_experts.MODELS}
DENSE = ["gpt2, scores scaled by layers", "opt, 350m", "gpt bigcode", "gpt neo", "mpt, clipped, scale, own head"]
EXPERTS = ["mixtral", "qwen2 moe", "qwen3 moe, all of it"]


def prompts_of(name: str) -> list[list[int]]:
    """Those with learned positions end sooner."""
    return PROMPTS + LONGER if name in EXPERTS else PROMPTS


def limits_of(name: str) -> dict[str, Any]:
    return LIMITS | {"max_model_len": 512 if name in EXPERTS else 128}


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def folder(make_model: MakeModel) -> Callable[[str], Path]:
    return lambda name: make_model(MODELS[name][0], **MODELS[name][1])


@pytest.fixture(scope="module")
def on_cpu(folder: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    @cache
    def tokens(name: str) -> list[list[int]]:
        with LLM(folder(name), device="cpu", dtype="fp32", **limits_of(name)) as llm:
            return generated(llm, prompts_of(name))

    return tokens


def generated(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY)]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 40}], ids=str)
@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_greedy_tokens_are_those_of_the_cpu(
    name: str, options: dict[str, Any], folder: Callable[[str], Path], on_cpu: Callable[[str], list[list[int]]]
) -> None:
    prompts = prompts_of(name)
    with LLM(folder(name), device="cuda", dtype="fp32", **limits_of(name), **options) as llm:
        for _ in range(2):
            assert generated(llm, prompts) == on_cpu(name)
        # alone: each pair of a token and an expert for itself
        assert [generated(llm, [prompt])[0] for prompt in prompts] == on_cpu(name)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_half_types_are_the_same_every_time_and_near_fp32(name: str, dtype: str, folder: Callable[[str], Path]) -> None:
    prompts, limits = prompts_of(name), limits_of(name)
    followed_by = [[5, 6, 7][:DECODED]] * len(prompts)
    found = [engine_logits(folder(name), prompts, followed_by, "cuda", dtype=dtype, **limits) for _ in range(2)]
    right = engine_logits(folder(name), prompts, followed_by, "cpu", dtype="fp32", **limits)
    for first, second, exact in zip(*found, right, strict=True):
        assert torch.equal(first, second)
        # the median: a router that rounding leads to another expert is off by more, for a few tokens
        assert (first.cpu() - exact).abs().median() < 0.05 * exact.std()


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opt, 350m", {}),
        ("gpt bigcode", {}),
        *((name, {"expert_parallel": whole}) for name in EXPERTS[:2] for whole in (False, True)),
    ],
    ids=str,
)
def test_two_ranks_choose_the_tokens_of_one(
    name: str, options: dict[str, Any], folder: Callable[[str], Path], on_cpu: Callable[[str], list[list[int]]]
) -> None:
    with LLM(folder(name), device="cuda", dtype="fp32", tensor_parallel_size=2, **limits_of(name), **options) as llm:
        assert generated(llm, prompts_of(name)) == on_cpu(name)
