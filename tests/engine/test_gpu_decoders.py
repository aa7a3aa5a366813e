"""Families of GPT-2's build on a GPU beside the CPU: the same greedy tokens in fp32, and half types near it."""

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import MakeModel
from tests.engine_logits import DECODED, engine_logits
from tests.models.cases_gpt2 import MODELS

from hasten import LLM, SamplingParams

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LENGTHS = (1, 2, 7, 16, 17, 33, 70, 110)
PROMPTS = [[(13 * length + 7 * place) % 480 + 4 for place in range(length)] for length in LENGTHS]
LIMITS: dict[str, Any] = {"kv_cache_memory": 64 << 20, "max_num_seqs": 16, "max_model_len": 128}
NAMES = ["gpt2, scores scaled by layers", "opt, 350m", "gpt bigcode", "gpt neo", "mpt, clipped, scale, own head"]


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
        with LLM(folder(name), device="cpu", dtype="fp32", **LIMITS) as llm:
            return generated(llm)

    return tokens


def generated(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 40}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_the_cpu(
    name: str, options: dict[str, Any], folder: Callable[[str], Path], on_cpu: Callable[[str], list[list[int]]]
) -> None:
    with LLM(folder(name), device="cuda", dtype="fp32", **LIMITS, **options) as llm:
        for _ in range(2):
            assert generated(llm) == on_cpu(name)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_types_are_the_same_every_time_and_near_fp32(name: str, dtype: str, folder: Callable[[str], Path]) -> None:
    followed_by = [[5, 6, 7][:DECODED]] * len(PROMPTS)
    found = [engine_logits(folder(name), PROMPTS, followed_by, "cuda", dtype=dtype, **LIMITS) for _ in range(2)]
    right = engine_logits(folder(name), PROMPTS, followed_by, "cpu", dtype="fp32", **LIMITS)
    for one, other, exact in zip(*found, right, strict=True):
        assert torch.equal(one, other)
        assert (one.cpu() - exact).abs().median() < 0.05 * exact.std()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["opt, 350m", "gpt bigcode"])
def test_two_ranks_choose_the_tokens_of_one(
    name: str, folder: Callable[[str], Path], on_cpu: Callable[[str], list[list[int]]]
) -> None:
    with LLM(folder(name), device="cuda", dtype="fp32", tensor_parallel_size=2, **LIMITS) as llm:
        assert generated(llm) == on_cpu(name)
