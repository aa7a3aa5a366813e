from __future__ import annotations

import itertools
import json
import os
import pty
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.waiting import LIMIT_S

from hasten import (
    LLM,
    CapacityError,
    ConfigError,
    EngineError,
    FinishReason,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
)
from hasten.engine.prompts import Prompt
from hasten.engine.sampler import Choice

if TYPE_CHECKING:
    from tests.engine.conftest import Reference

References = Callable[[Path], "Reference"]

BLOCK = 16
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 70)
COUNT = 24
CLOSE = 1e-4
"""Most that a log-probability in fp32 may differ from Hugging Face's."""
FIXTURES = (
    "tiny_bloom",
    "tiny_bloom_12_heads",
    "tiny_bloom_untied",
    "tiny_bloom_post_norm",
    "tiny_bloom_odd_vocab",
)


def random_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 490) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts()
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def used(llm: LLM) -> int:
    return llm.engine.scheduler.blocks.num_used


def preemptions(llm: LLM) -> int:
    return llm.engine.scheduler.stats.preemptions


def cache_of(blocks: int, folder: Path) -> dict[str, Any]:
    """The option for a cache of so many blocks."""
    with LLM(folder, kv_cache_memory=1 << 24) as llm:
        return {"kv_cache_memory": blocks * llm.engine.worker.runner.block_bytes}


@pytest.fixture(scope="module", params=[False, True], ids=["steps", "overlapped"])
def llm(request: pytest.FixtureRequest, tiny_bloom: Path) -> Iterator[LLM]:
    """With steps one after the other, and overlapped; all else as it is by default."""
    with LLM(tiny_bloom, overlap_steps=request.param) as engine:
        yield engine


def like(llm: LLM) -> dict[str, Any]:
    """The option that makes steps overlap in another engine as in this one."""
    return {"overlap_steps": llm.engine.worker.overlap}


def assert_nothing_is_left(llm: LLM) -> None:
    assert used(llm) == 0
    assert not llm.engine.has_unfinished
    assert not llm.engine.scheduler.has_work
    assert llm.engine.requests.owners == {}
    assert not llm.engine._flights


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    # not asked for as a fixture: tests without an engine would run once for each kind
    llm = request.getfixturevalue("llm") if "llm" in request.fixturenames else None
    yield
    if llm is not None:
        assert_nothing_is_left(llm)


# --- the same tokens as Hugging Face's --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy_tokens(reference: References) -> Callable[[Path], list[list[int]]]:
    known: dict[Path, list[list[int]]] = {}

    def make(folder: Path) -> list[list[int]]:
        if folder not in known:
            known[folder] = [reference(folder).greedy(prompt, COUNT) for prompt in PROMPTS]
        return known[folder]

    return make


@pytest.mark.parametrize("fixture", FIXTURES)
def test_greedy_tokens_are_those_of_transformers(
    fixture: str, request: pytest.FixtureRequest, greedy_tokens: Callable[[Path], list[list[int]]]
) -> None:
    folder = request.getfixturevalue(fixture)
    right = greedy_tokens(folder)
    with LLM(folder) as llm:
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == right
        for prompt, tokens in zip(PROMPTS, right, strict=True):
            assert tokens_of(llm.generate(prompt, GREEDY)) == [tokens]
        assert used(llm) == 0
    with LLM(folder, **cache_of(8, folder), max_num_batched_tokens=12, max_num_seqs=6) as llm:
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == right
        assert preemptions(llm) > 0
        assert used(llm) == 0


OPTIONS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 8, "max_num_seqs": 8},
    {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    {"enable_prefix_caching": False},
    {"enable_prefix_caching": False, "max_num_batched_tokens": 20, "max_num_seqs": 3},
    {"block_size": 1},
    {"block_size": 5},
    {"block_size": 128},
    {"overlap_steps": True},
    {"overlap_steps": True, "max_num_batched_tokens": 8, "max_num_seqs": 8},
    {"overlap_steps": True, "enable_prefix_caching": False, "max_num_batched_tokens": 20, "max_num_seqs": 3},
    {"overlap_steps": True, "block_size": 1},
    {"itl_target": 1e-3, "max_num_batched_tokens": 8, "max_num_seqs": 3},
    {"itl_target": 1e-3, "max_num_seqs": 3, "overlap_steps": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_tokens_do_not_depend_on_the_options(
    options: dict[str, Any], tiny_bloom: Path, greedy_tokens: Callable[[Path], list[list[int]]]
) -> None:
    with LLM(tiny_bloom, kv_cache_memory=1 << 24, **options) as llm:
        for _ in range(2):  # the second time out of the prefix cache, where there is one
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy_tokens(tiny_bloom)
            assert used(llm) == 0
        hits = llm.engine.scheduler.blocks.prefix_hits
        assert (hits > 0) == (options.get("enable_prefix_caching", True) and options.get("block_size", 16) < 70)
        assert preemptions(llm) == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_are_timed_where_there_is_a_target(overlap: bool, tiny_bloom: Path) -> None:
    stats = []
    for target in (0, 1e-3):
        with LLM(tiny_bloom, itl_target=target, max_num_seqs=3, overlap_steps=overlap) as llm:
            lengths = [SamplingParams(temperature=0, max_tokens=3 + 2 * index) for index in range(len(PROMPTS))]
            llm.generate(PROMPTS, lengths)  # of different lengths, so that prompts come in while others decode
            stats.append(llm.engine.stats)
    without, with_target = stats
    assert without.mixed_steps == without.mixed_seconds == 0
    assert with_target.mixed_steps > 0
    assert with_target.mixed_seconds > 0
    assert with_target.predicted_mixed_seconds > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_requests_make_the_same_tokens(
    prefix_cache: bool, overlap: bool, tiny_bloom: Path, greedy_tokens: Callable[[Path], list[list[int]]]
) -> None:
    options: dict[str, Any] = {"enable_prefix_caching": prefix_cache, "overlap_steps": overlap}
    with LLM(tiny_bloom, **cache_of(6, tiny_bloom), **options) as llm:
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy_tokens(tiny_bloom)
        assert preemptions(llm) >= 3
        assert used(llm) == 0


def test_prompts_that_begin_alike_share_blocks(llm: LLM, tiny_bloom: Path, reference: References) -> None:
    prompts = [PROMPTS[-1][:50] + tail for tail in ([], [7], [8], [7, 9], PROMPTS[2])]
    blocks = llm.engine.scheduler.blocks
    llm.generate(prompts[0], GREEDY)
    before = blocks.prefix_hits
    outputs = llm.generate(prompts, GREEDY)
    assert blocks.prefix_hits - before == 5 * (50 // BLOCK) * BLOCK
    assert tokens_of(outputs) == [reference(tiny_bloom).greedy(prompt, COUNT) for prompt in prompts]


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 9, "max_num_seqs": 4}, {"overlap_steps": True}], ids=str
)
def test_logprobs_are_those_of_transformers(
    options: dict[str, Any], tiny_bloom: Path, reference: References, llm: LLM
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    with LLM(tiny_bloom, **options) as own:
        if not options:
            own.generate(PROMPTS, GREEDY)  # the prefix cache must not take the prompt's logits away
        outputs = own.generate(PROMPTS, params)
        preempting = cache_of(7, tiny_bloom)
    with LLM(tiny_bloom, **preempting) as own:
        again = own.generate(PROMPTS, params)
        assert preemptions(own) > 0
    for prompt, output in [*zip(PROMPTS, outputs, strict=True), *zip(PROMPTS, again, strict=True)]:
        completion = output.outputs[0]
        wanted = reference(tiny_bloom).logprobs(prompt + completion.token_ids)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids) == 8
        found = [*output.prompt_logprobs[1:], *completion.logprobs]
        total = 0.0
        for index, (top, token) in enumerate(zip(found, [*prompt, *completion.token_ids][1:], strict=True)):
            requested = 2 if index < len(prompt) - 1 else 3
            order = wanted[index].argsort(descending=True).tolist()
            assert top is not None
            assert set(top) == {token, *order[:requested]}
            for other, entry in top.items():
                assert abs(entry.logprob - float(wanted[index, other])) < CLOSE
                assert entry.rank == order.index(other) + 1
                assert entry.decoded_token == llm.tokenizer.decode([other], skip_special_tokens=False)
            total += top[token].logprob if index >= len(prompt) - 1 else 0
        assert completion.cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_of_several_completions_come_once(llm: LLM) -> None:
    each, three = (SamplingParams(prompt_logprobs=1, seed=1, n=n, max_tokens=3) for n in (1, 3))
    alone, together = llm.generate(PROMPTS[4], each)[0], llm.generate(PROMPTS[4], three)[0]
    assert alone.prompt_logprobs is not None
    assert together.prompt_logprobs is not None
    assert len(together.prompt_logprobs) == len(PROMPTS[4])
    for a, b in zip(alone.prompt_logprobs[1:], together.prompt_logprobs[1:], strict=True):
        assert a is not None
        assert b is not None
        assert {token: entry.rank for token, entry in a.items()} == {token: entry.rank for token, entry in b.items()}
    assert llm.generate(PROMPTS[0], each)[0].prompt_logprobs == [None]


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 0.05), ("bf16", 0.4)])
def test_half_precision_stays_near(dtype: str, bound: float, tiny_bloom: Path, reference: References) -> None:
    prompt = random_prompts((200,), seed=5)[0]
    wanted = reference(tiny_bloom).logprobs(prompt)
    with LLM(tiny_bloom, dtype=dtype) as llm:
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=COUNT, prompt_logprobs=0))[0]
        assert used(llm) == 0
    assert output.prompt_logprobs is not None
    differences = [
        abs(top[token].logprob - float(wanted[index, token]))
        for index, (top, token) in enumerate(zip(output.prompt_logprobs[1:], prompt[1:], strict=True))
        if top is not None
    ]
    assert len(differences) == 199
    assert 0 < max(differences) < bound


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("half", torch.float16),
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
    ],
)
def test_names_of_data_types(name: str, dtype: torch.dtype, tiny_bloom: Path) -> None:
    with LLM(tiny_bloom, dtype=name, kv_cache_memory=1 << 20) as llm:
        assert llm.dtype == dtype
        assert llm.engine.worker.runner._caches.tensors[0].dtype == dtype


# --- sampling ---------------------------------------------------------------------------------------------------------


def seeded() -> list[SamplingParams]:
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 20},
        {"top_p": 0.9, "temperature": 1.5},
        {"min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0},
        {"n": 3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 1},
        {"min_tokens": 5},
    ]
    return [SamplingParams(seed=7, max_tokens=COUNT, ignore_eos=True, **chosen) for chosen in options]


def test_a_seed_gives_the_same_tokens_alone_among_others_chunked_and_preempted(llm: LLM, tiny_bloom: Path) -> None:
    alone = [tokens_of(llm.generate(prompt, params)) for prompt, params in zip(PROMPTS, seeded(), strict=True)]
    right = [tokens for each in alone for tokens in each]
    assert tokens_of(llm.generate(PROMPTS, seeded())) == right
    crowd = random_prompts((3, 40) * 8, seed=9)
    mixed = llm.generate([*crowd, *PROMPTS], [SamplingParams(max_tokens=30)] * len(crowd) + seeded())
    assert tokens_of(mixed[len(crowd) :]) == right
    with LLM(tiny_bloom, max_num_batched_tokens=7, max_num_seqs=5, **like(llm)) as other:
        assert tokens_of(other.generate(PROMPTS, seeded())) == right
    with LLM(tiny_bloom, **cache_of(7, tiny_bloom), **like(llm)) as other:
        assert tokens_of(other.generate(PROMPTS, seeded())) == right
        assert preemptions(other) > 0
        assert used(other) == 0


def test_completions_of_one_prompt_differ_are_reproducible_and_share_its_blocks(llm: LLM) -> None:
    prompt, n = PROMPTS[-1], 5
    params = SamplingParams(n=n, seed=11, max_tokens=6, ignore_eos=True)
    first, second = llm.generate([prompt] * 2, params)
    assert [completion.index for completion in first.outputs] == list(range(n))
    assert len({tuple(completion.token_ids) for completion in first.outputs}) == n
    assert first.outputs == second.outputs
    assert tokens_of(llm.generate(prompt, SamplingParams(seed=11, max_tokens=6, ignore_eos=True))) == [
        first.outputs[0].token_ids
    ]
    most = 0
    for _ in llm.stream(prompt, params):
        most = max(most, used(llm))
    assert most == len(prompt) // BLOCK + n  # 4 full blocks once, and for each the one that it writes


def test_requests_without_a_seed_differ_but_runs_do_not(tiny_bloom: Path) -> None:
    def run(seed: int) -> list[list[int]]:
        with LLM(tiny_bloom, seed=seed) as llm:
            return tokens_of(llm.generate([PROMPTS[2]] * 3, SamplingParams(max_tokens=12)))

    tokens = run(0)
    assert len(set(map(tuple, tokens))) == 3
    assert run(0) == tokens
    assert run(1) != tokens


def test_the_greatest_outputs_of_a_call_begin_first_with_the_same_tokens(llm: LLM, tiny_bloom: Path) -> None:
    lengths = (2, 3, 2, 3, 12, 2)
    each = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    prompts = PROMPTS[: len(lengths)]

    def steps_of(run: Callable[[LLM], list[RequestOutput]]) -> tuple[int, list[list[int]]]:
        with LLM(tiny_bloom, max_num_seqs=2, **like(llm)) as few:
            before = few.engine.scheduler.stats.steps
            outputs = run(few)
            return few.engine.scheduler.stats.steps - before, tokens_of(outputs)

    def streamed(few: LLM) -> list[RequestOutput]:
        outputs = [output for output in few.stream(prompts, each) if output.finished]
        return sorted(outputs, key=lambda output: output.request_id)

    together, tokens = steps_of(lambda few: few.generate(prompts, each))
    one_by_one, in_their_order = steps_of(streamed)
    assert tokens == in_their_order  # without a seed of their own theirs are by their places
    assert [len(each) for each in tokens] == list(lengths)
    assert together < one_by_one


def test_equal_requests_in_one_call_are_answered_each(llm: LLM) -> None:
    outputs = llm.generate([PROMPTS[3]] * 20, GREEDY)
    assert len(outputs) == 20
    assert len({output.request_id for output in outputs}) == 20
    assert len(set(map(tuple, tokens_of(outputs)))) == 1


# --- how a completion ends --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(llm: LLM) -> RequestOutput:
    """What the model says, left alone: other tests cut it somewhere."""
    output = next(
        output
        for output in llm.generate(random_prompts((6,) * 150, seed=2), GREEDY)
        if len(set(output.outputs[0].token_ids)) >= 12 and re.search("[a-z]{5}", output.outputs[0].text[8:])
    )
    assert output.outputs[0].finish_reason is FinishReason.LENGTH
    return output


def again(llm: LLM, plain: RequestOutput, **options: Any) -> Any:
    params = SamplingParams(**{"temperature": 0, "max_tokens": COUNT, "ignore_eos": True, **options})
    return llm.generate(plain.prompt_token_ids, params)[0].outputs[0]


def first_new(tokens: list[int], least: int) -> int:
    """A place from `least` on whose token did not come before."""
    return next(index for index in range(least, len(tokens)) if tokens[index] not in tokens[:index])


def test_length(llm: LLM, plain: RequestOutput, tiny_bloom: Path) -> None:
    result = again(llm, plain, max_tokens=5)
    assert (result.finish_reason, result.stop_reason) == (FinishReason.LENGTH, None)
    assert result.token_ids == plain.outputs[0].token_ids[:5]
    assert result.text == llm.tokenizer.decode(result.token_ids)
    with LLM(tiny_bloom, max_model_len=10, **like(llm)) as short:
        result = again(short, plain)
        assert (result.finish_reason, len(result.token_ids)) == (FinishReason.LENGTH, 10 - len(plain.prompt_token_ids))


@pytest.mark.parametrize("include", [False, True])
def test_stop_token(llm: LLM, plain: RequestOutput, include: bool) -> None:
    tokens = plain.outputs[0].token_ids
    index = first_new(tokens, 6)
    result = again(llm, plain, stop_token_ids=[3, tokens[index]], include_stop_str_in_output=include)
    assert (result.finish_reason, result.stop_reason) == (FinishReason.STOP, tokens[index])
    assert result.token_ids == tokens[: index + 1]
    assert result.text == llm.tokenizer.decode(tokens[: index + include])


@pytest.mark.parametrize("include", [False, True])
def test_stop_words_by_ids(llm: LLM, plain: RequestOutput, include: bool) -> None:
    tokens = plain.outputs[0].token_ids
    index = first_new(tokens, 6)
    run = tokens[index - 2 : index + 1]
    params: dict[str, Any] = {"stop_words_ids": [[5, 6], run], "include_stop_str_in_output": include}
    result = again(llm, plain, **params)
    assert (result.finish_reason, result.stop_reason) == (FinishReason.STOP, run[-1])
    assert result.token_ids == tokens[: index + 1]
    assert result.text == llm.tokenizer.decode(tokens[: index + 1 if include else index - 2])
    texts = [
        output.outputs[0].text
        for output in llm.stream(plain.prompt_token_ids, SamplingParams(temperature=0, max_tokens=COUNT, **params))
    ]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == result.text


@pytest.mark.parametrize("include", [False, True])
def test_stop_string(llm: LLM, plain: RequestOutput, include: bool) -> None:
    text = plain.outputs[0].text
    index = next(m.start() for m in re.finditer("[a-z]{5}", text) if m.start() >= 8 and text.find(m[0]) == m.start())
    word = text[index : index + 5]
    result = again(llm, plain, stop=["~~~~", word], include_stop_str_in_output=include)
    assert (result.finish_reason, result.stop_reason) == (FinishReason.STOP, word)
    assert result.text == text[: index + 5 if include else index]
    assert result.token_ids == plain.outputs[0].token_ids[: len(result.token_ids)]
    assert word in llm.tokenizer.decode(result.token_ids)
    assert word not in llm.tokenizer.decode(result.token_ids[:-1])


def test_end_token(make_bloom: Callable[..., Path], llm: LLM, plain: RequestOutput) -> None:
    tokens = plain.outputs[0].token_ids
    index = first_new(tokens, 6)
    with LLM(make_bloom(eos_token_id=tokens[index]), **like(llm)) as other:
        result = again(other, plain, ignore_eos=False)
        assert (result.finish_reason, result.stop_reason) == (FinishReason.STOP, None)
        assert result.token_ids == tokens[: index + 1]
        assert result.text == llm.tokenizer.decode(tokens[:index])
        assert again(other, plain).token_ids == tokens
        least = again(other, plain, ignore_eos=False, min_tokens=index + 3)
        assert len(least.token_ids) >= index + 3
        assert least.token_ids[:index] == tokens[:index]
        assert tokens[index] not in least.token_ids[: index + 3]


def test_no_stop_before_min_tokens(llm: LLM, plain: RequestOutput) -> None:
    tokens = plain.outputs[0].token_ids
    index = first_new(tokens, 4)
    result = again(llm, plain, stop_token_ids=[tokens[index]], min_tokens=index + 2)
    assert tokens[index] not in result.token_ids[: index + 2]
    result = again(llm, plain, stop_words_ids=[[tokens[index]]], min_tokens=index + 2)
    assert result.token_ids[: index + 2] == tokens[: index + 2]
    result = again(llm, plain, stop_words_ids=[[tokens[index]]], min_tokens=index + 1)
    assert result.token_ids == tokens[: index + 1]


def test_bad_words(llm: LLM, plain: RequestOutput) -> None:
    tokens = plain.outputs[0].token_ids
    index = first_new(tokens, 4)
    result = again(llm, plain, bad_words_ids=[tokens[index - 1 : index + 1]])
    assert result.token_ids[:index] == tokens[:index]
    assert result.token_ids[index] != tokens[index]
    word = re.findall("[a-z]{3,}", plain.outputs[0].text)[-1]
    runs = llm.tokenizer.words_ids(word)
    result = again(llm, plain, bad_words=[word])
    assert not any(
        result.token_ids[i : i + len(run)] == run for run in runs for i in range(len(result.token_ids) - len(run) + 1)
    )


def test_text_is_left_out_where_it_is_not_wanted(llm: LLM, plain: RequestOutput) -> None:
    result = again(llm, plain, detokenize=False)
    assert (result.text, result.token_ids) == ("", plain.outputs[0].token_ids)


def test_a_vocabulary_larger_than_the_tokenizers(tiny_bloom_odd_vocab: Path) -> None:
    with LLM(tiny_bloom_odd_vocab) as llm:
        params = SamplingParams(temperature=20.0, max_tokens=200, stop="never this", seed=0)
        *_, last = llm.stream([5, 6], params)
        assert max(last.outputs[0].token_ids) >= llm.tokenizer.vocab_size
        assert last.outputs[0].text == llm.tokenizer.decode(last.outputs[0].token_ids)


# --- overlapped steps -------------------------------------------------------------------------------------------------


def mixed() -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of all kinds, of which some end before their `max_tokens`, and prompts of which some begin alike."""
    common = PROMPTS[-1][:36]
    prompts = [*random_prompts((1, 5, 16, 17, 33), seed=21), *([*common, token] for token in range(10, 17)), common]
    penalties: dict[str, Any] = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "logit_bias": {60: 4.0, 70: -9.0}}
    options: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 30, "repetition_penalty": 1.3},
        {"seed": 1, "max_tokens": 1},
        {"seed": 2, "max_tokens": 25, "n": 3, "stop": ["e", "a"], "presence_penalty": 0.8, "frequency_penalty": 0.4},
        {"temperature": 0, "max_tokens": 20, "stop_token_ids": list(range(0, 490, 7))},
        {"seed": 3, "max_tokens": 30, "stop_words_ids": [[token] for token in range(3, 490, 9)]},
        {"seed": 4, "max_tokens": 12, "logprobs": 2, "prompt_logprobs": 1},
        {"seed": 5, "max_tokens": 18, "min_tokens": 6, "stop_token_ids": list(range(0, 490, 3))},
        {"temperature": 0, "max_tokens": 16, "bad_words_ids": [[a, b] for a in common for b in common]},
        {"seed": 6, "max_tokens": 1, "n": 4},
        {"seed": 7, "max_tokens": 22, "top_p": 0.8, "stop": "t", "include_stop_str_in_output": True, **penalties},
        {"seed": 8, "max_tokens": 9, "n": 2, "top_k": 5, "repetition_penalty": 1.2},
        {"temperature": 0, "max_tokens": 24, "stop": "er", "allowed_token_ids": range(50, 300), "min_tokens": 4},
        {"temperature": 0, "max_tokens": 3, "ignore_eos": True},
    ]
    return prompts, [SamplingParams(**chosen) for chosen in options]


def same_but_for_logprobs(found: list[RequestOutput], right: list[RequestOutput]) -> None:
    """Everything equal; log-probabilities are near, since batches that differ add up in another order."""
    for first, other in zip(found, right, strict=True):
        for a, b in zip(first.outputs, other.outputs, strict=True):
            assert (a.token_ids, a.text, a.finish_reason, a.stop_reason) == (
                b.token_ids,
                b.text,
                b.finish_reason,
                b.stop_reason,
            )
            assert [list(top) for top in a.logprobs or ()] == [list(top) for top in b.logprobs or ()]
        assert len(first.prompt_logprobs or ()) == len(other.prompt_logprobs or ())


@pytest.fixture(scope="module")
def right_mixed(tiny_bloom: Path) -> list[RequestOutput]:
    with LLM(tiny_bloom, overlap_steps=False) as one_after_the_other:
        outputs = one_after_the_other.generate(*mixed())
    reasons = [completion.finish_reason for output in outputs for completion in output.outputs]
    assert reasons.count(FinishReason.STOP) >= 5
    assert reasons.count(FinishReason.LENGTH) >= 5
    return outputs


@pytest.mark.any_python
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 4}, {"max_num_seqs": 6, "blocks": 8}], ids=str
)
def test_overlapped_steps_give_the_same_outputs(
    options: dict[str, Any], prefix_cache: bool, tiny_bloom: Path, right_mixed: list[RequestOutput]
) -> None:
    rest = {key: value for key, value in options.items() if key != "blocks"}
    cache = cache_of(options["blocks"], tiny_bloom) if "blocks" in options else {}
    with LLM(tiny_bloom, overlap_steps=True, enable_prefix_caching=prefix_cache, **rest, **cache) as llm:
        for _ in range(2):
            same_but_for_logprobs(llm.generate(*mixed()), right_mixed)
            assert_nothing_is_left(llm)
        assert (preemptions(llm) > 0) == ("blocks" in options)


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
def test_overlapped_ranks_give_the_same_outputs(
    tiny_bloom: Path, right_mixed: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = {key: value // 2 for key, value in cache_of(9, tiny_bloom).items()}  # a rank's blocks are half as large
    options: dict[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 6, **tight}
    penalized = SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, ignore_eos=True)
    with LLM(tiny_bloom, overlap_steps=True, tensor_parallel_size=2, device="cpu", itl_target=1e-3, **options) as llm:
        limits = itertools.cycle([None, 1, 7, 3])
        monkeypatch.setattr(llm.engine._pacer, "prompt_tokens", lambda *_: next(limits))  # the other rank is told
        found = llm.generate(*mixed())
        same_but_for_logprobs(found, right_mixed)
        assert preemptions(llm) > 0
        assert_nothing_is_left(llm)
        stream = llm.stream(PROMPTS, SamplingParams(max_tokens=50, n=2))
        for _ in range(3):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        prompts, params = mixed()
        again = llm.generate([*prompts, PROMPTS[5]], [*params, penalized])
        same_but_for_logprobs(again[:-1], right_mixed)
        assert_nothing_is_left(llm)
    with LLM(tiny_bloom) as llm:
        assert tokens_of(again[-1:]) == tokens_of(llm.generate(PROMPTS[5], penalized))


def test_a_step_is_launched_before_the_tokens_of_the_last_are_known(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def note(event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            events.append(event)
            return call(*given)

        return noted

    monkeypatch.setattr(llm.engine.worker, "launch", note("launch", llm.engine.worker.launch))
    monkeypatch.setattr(llm.engine.requests, "_take_token", note("token", llm.engine.requests._take_token))
    overlapped = ["launch", *["launch", "token"] * 3, "token"]
    for options in ({}, {"repetition_penalty": 1.2}, {"bad_words_ids": [[8, 9]]}, {"logprobs": 2}):
        events.clear()
        llm.generate(PROMPTS[1], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **options))
        assert events == (overlapped if llm.engine.worker.overlap else ["launch", "token"] * 4)


@pytest.mark.parametrize(
    "needy", [{"repetition_penalty": 1.4}, {"frequency_penalty": 1.5}, {"bad_words_ids": [[8, 9], [7]]}], ids=str
)
def test_who_looks_back_at_its_tokens_is_exact_beside_who_does_not(
    needy: dict[str, Any], llm: LLM, plain: RequestOutput
) -> None:
    tokens = plain.outputs[0].token_ids
    if "bad_words_ids" in needy:
        needy = {"bad_words_ids": [tokens[3:5], tokens[9:10]]}
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, **needy)
    before = len(plain.prompt_token_ids)
    found = llm.generate([PROMPTS[2], plain.prompt_token_ids, PROMPTS[3]], [GREEDY, params, GREEDY])[1]
    result = [*plain.prompt_token_ids, *found.outputs[0].token_ids]
    assert result[before:] != tokens
    each = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, **needy)
    if "repetition_penalty" in needy:  # prompt and output count alike, so each token can be asked for alone
        for end in range(before, len(result)):
            assert tokens_of(llm.generate(result[:end], each)) == [result[end : end + 1]]
    else:
        with LLM(llm.engine.config.model, overlap_steps=False) as other:
            assert tokens_of(other.generate(plain.prompt_token_ids, params)) == [result[before:]]


def test_streams_show_no_surplus_token(llm: LLM, plain: RequestOutput) -> None:
    tokens = plain.outputs[0].token_ids
    index = first_new(tokens, 6)
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, stop_token_ids=[tokens[index]])
    seen: dict[str, list[RequestOutput]] = {}
    for output in llm.stream([plain.prompt_token_ids, plain.prompt_token_ids], [params, GREEDY]):
        seen.setdefault(output.request_id, []).append(output)
    ended, other = (tokens_of(outputs) for _, outputs in sorted(seen.items(), key=lambda item: int(item[0])))
    assert ended == [tokens[: end + 1] for end in range(index + 1)]
    assert other == [tokens[: end + 1] for end in range(COUNT)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no more of it\nand details")], ids=repr)
@pytest.mark.parametrize("place", ["launch", "collect"])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_in_a_step_frees_everything_and_unless_an_interrupt_ends_the_engine(
    error: BaseException, place: str, overlap: bool, tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count()
    with LLM(tiny_bloom, overlap_steps=overlap) as llm:
        owner: Any = llm.engine.worker.runner if place == "launch" else Choice
        name = "forward" if place == "launch" else "collect"
        original = getattr(owner, name)

        def fail(*given: Any) -> Any:
            if next(steps) == 3:
                raise error
            return original(*given)

        monkeypatch.setattr(owner, name, fail)
        wanted = CapacityError if isinstance(error, RuntimeError) else KeyboardInterrupt
        message = "lower max_num_batched_tokens.*no more of it" if wanted is CapacityError else None
        with pytest.raises(wanted, match=message) as raised:
            llm.generate(PROMPTS, SamplingParams(max_tokens=20, n=2))
        assert "details" not in str(raised.value)
        assert_nothing_is_left(llm)
        if wanted is KeyboardInterrupt:  # one rank alone goes on
            assert len(llm.generate(PROMPTS, GREEDY)) == len(PROMPTS)
            return
        with pytest.raises(EngineError, match=r"closed: a step failed \(CapacityError: the device's memory ran out"):
            llm.generate(PROMPTS, GREEDY)


def test_an_engine_may_be_closed_with_a_step_in_flight(tiny_bloom: Path) -> None:
    for ranks in (1, 2):
        llm = LLM(tiny_bloom, overlap_steps=True, tensor_parallel_size=ranks, device="cpu")
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        assert llm.engine._flights
        engine = llm.engine
        llm.close()
        assert not engine._flights
        with pytest.raises(EngineError, match="closed"):
            next(stream)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_grows_to_what_generate_returns(llm: LLM) -> None:
    params = [
        SamplingParams(seed=3, max_tokens=20, temperature=3.0),
        SamplingParams(seed=4, max_tokens=20, n=2, logprobs=1, stop=["a", "e"]),
        SamplingParams(temperature=0, max_tokens=9),
    ]
    prompts = PROMPTS[2:5]
    llm.reset_prefix_cache()  # both compute the same steps, bit for bit
    whole = llm.generate(prompts, params)
    llm.reset_prefix_cache()
    seen: dict[str, list[RequestOutput]] = {}
    for output in llm.stream(prompts, params):
        seen.setdefault(output.request_id, []).append(output)
    assert len(seen) == 3
    for outputs, right in zip((seen[key] for key in sorted(seen, key=int)), whole, strict=True):
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs == right.outputs
        for earlier, later in pairwise(outputs):
            for a, b in zip(earlier.outputs, later.outputs, strict=False):
                assert b.text.startswith(a.text)
                assert b.token_ids[: len(a.token_ids)] == a.token_ids
                assert len(a.logprobs or ()) in (0, len(a.token_ids))  # not grown since
        lengths = [sum(len(completion.token_ids) for completion in output.outputs) for output in outputs]
        assert lengths == sorted(set(lengths))


def test_a_closed_stream_frees_everything(llm: LLM) -> None:
    for steps in (1, 2, 5):
        stream = llm.stream(PROMPTS, SamplingParams(max_tokens=50, n=2))
        for _ in range(steps):
            next(stream)
        assert used(llm) > 0
        with pytest.raises(EngineError, match="under way"):
            llm.generate(PROMPTS[0])
        stream.close()  # type: ignore[attr-defined]
        assert used(llm) == 0
        assert not llm.engine.scheduler.has_work
        assert tokens_of(llm.generate(PROMPTS[0], GREEDY))


def test_withdrawing_in_the_middle_of_a_prompt(tiny_bloom: Path) -> None:
    with LLM(tiny_bloom, max_num_batched_tokens=16, max_num_seqs=4) as llm:
        right = tokens_of(llm.generate(PROMPTS, GREEDY))
        stream = llm.stream([PROMPTS[0], *PROMPTS[-1:] * 3], GREEDY)
        next(stream)
        assert any(s.num_computed < s.prompt_len for s in llm.engine.scheduler.running)
        stream.close()  # type: ignore[attr-defined]
        assert used(llm) == 0
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == right


def test_an_error_in_a_loop_over_a_stream_frees_everything(llm: LLM) -> None:
    def loop() -> None:
        for _ in llm.stream(PROMPTS, GREEDY):
            raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        loop()
    assert used(llm) == 0


# --- what a caller may give, and what not -----------------------------------------------------------------------------


def test_prompts_as_text_or_ids_one_or_many(llm: LLM) -> None:
    text = "the lamp and the river"
    ids = llm.tokenizer.encode(text)
    each = llm.generate(text, GREEDY)
    assert (each[0].prompt, each[0].prompt_token_ids) == (text, ids)
    assert llm.generate(ids, GREEDY)[0].prompt is None
    several: list[Prompt] = [text, ids, "Anna", tuple(ids)]
    result = llm.generate(several, GREEDY)
    assert [output.prompt for output in result] == [text, None, "Anna", None]
    assert tokens_of(result)[0] == tokens_of(result)[1] == tokens_of(result)[3] == tokens_of(each)[0]
    assert llm.generate([], GREEDY) == []
    assert list(llm.stream([], GREEDY)) == []


def test_prompts_and_keywords_of_vllm(llm: LLM) -> None:
    text = "the lamp and the river"
    ids = llm.tokenizer.encode(text)
    wanted = tokens_of(llm.generate(text, GREEDY))
    forms: list[Prompt] = [{"prompt": text}, {"prompt_token_ids": ids}, {"prompt_token_ids": ids, "prompt": text}]
    for form in forms:
        assert tokens_of(llm.generate(form, sampling_params=GREEDY)) == wanted
    outputs = llm.generate(prompts=forms, sampling_params=[GREEDY] * 3)
    assert [output.prompt for output in outputs] == [text, None, text]
    assert tokens_of(outputs) == wanted * 3
    streamed = llm.stream(prompts=forms[1], sampling_params=GREEDY)
    assert [tokens_of([output]) for output in streamed][-1] == wanted


def test_text_that_is_no_utf8_names_the_field(llm: LLM) -> None:
    for prompts, begin in (
        ("a\ud83d", "the prompt is not valid UTF-8"),
        (["abc", "a\udcff"], r"prompts\[1\] is not valid UTF-8"),
    ):
        with pytest.raises(InvalidRequestError, match=f"^{begin}"):
            llm.generate(prompts, GREEDY)
    for call in (llm.tokenizer.encode, lambda text: llm.tokenizer.encode_batch(["a", text])):
        with pytest.raises(InvalidRequestError, match=r"^the text is not valid UTF-8"):
            call("a\ud83d")
    with pytest.raises(InvalidRequestError, match=r"^the text is not valid UTF-8"):
        llm.tokenizer.encode_pair("a", "\ud83d")


def test_no_limit_of_tokens_is_the_models(tiny_bloom: Path, llm: LLM) -> None:
    with LLM(tiny_bloom, max_model_len=40, **like(llm)) as small:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        result = small.generate([PROMPTS[2], PROMPTS[0]], params)
    assert [len(tokens) for tokens in tokens_of(result)] == [40 - BLOCK + 1, 39]
    assert {output.outputs[0].finish_reason for output in result} == {FinishReason.LENGTH}


def test_allowed_tokens(llm: LLM) -> None:
    result = llm.generate(PROMPTS[:3], SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=[7, 9, 300]))
    assert {token for tokens in tokens_of(result) for token in tokens} <= {7, 9, 300}
    (nothing,) = llm.generate([5], SamplingParams(allowed_token_ids=[7], bad_words_ids=[[7]]))[0].outputs
    assert (nothing.finish_reason, nothing.token_ids) == (FinishReason.ERROR, [])
    assert "excludes the whole vocabulary" in str(nothing.stop_reason)


def test_runs_are_looked_for_in_the_output_alone(llm: LLM, plain: RequestOutput) -> None:
    """As in vLLM: a banned or stopping run that begins in the prompt does nothing, one in the output does."""
    ids, tokens = plain.prompt_token_ids, plain.outputs[0].token_ids
    across = [ids[-1], tokens[0]]
    for options in ({"bad_words_ids": [across]}, {"stop_words_ids": [across]}):
        params = replace(GREEDY, **options)  # type: ignore[arg-type]
        assert tokens_of(llm.generate(ids, params)) == [tokens[:COUNT]]
    within = tokens[:2]
    assert tokens_of(llm.generate(ids, replace(GREEDY, stop_words_ids=[within])))[0] == within
    assert tokens_of(llm.generate(ids, replace(GREEDY, bad_words_ids=[within])))[0][:2] != within


def test_parameters_for_all_for_each_or_none(llm: LLM) -> None:
    assert len(llm.generate(PROMPTS[0])[0].outputs[0].token_ids) <= 16
    counts = [3, 1, 2]
    outputs = llm.generate(PROMPTS[:3], [SamplingParams(max_tokens=count, ignore_eos=True) for count in counts])
    assert [len(tokens) for tokens in tokens_of(outputs)] == counts
    for wrong in (2, 4, 0):
        with pytest.raises(InvalidRequestError, match=rf"3 prompts, but {wrong} sampling parameters"):
            llm.generate(PROMPTS[:3], [SamplingParams()] * wrong)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens"),
        ("", {}, "no tokens"),
        ([5] * 512, {}, "512 tokens.*512.*max_model_len"),
        ([5, 493 + 7], {}, r"the prompt has token id 500; the vocabulary ends at 492"),
        ([5, -1], {}, "token id -1"),
        ([5], {"stop_token_ids": [493]}, "stop_token_ids has token id 493"),
        ([5], {"stop_words_ids": [[1, 600]]}, "stop_words_ids has token id 600"),
        ([5], {"bad_words_ids": [[-3]]}, "bad_words_ids has token id -3"),
    ],
)
def test_requests_that_cannot_be_served(
    llm: LLM, prompt: str | list[int], options: dict[str, Any], message: str
) -> None:
    params = SamplingParams(**options)
    for call in (llm.generate, lambda *given: list(llm.stream(*given))):
        with pytest.raises(InvalidRequestError, match=message):
            call([[5, 6], prompt, [7]], params)
        assert not llm.engine.has_unfinished
        assert tokens_of(llm.generate(PROMPTS[0], GREEDY))  # and the engine goes on


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3},
        {"frequency_penalty": float("nan")},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 20, "max_tokens": 10},
        {"stop": [""]},
        {"bad_words": [""]},
        {"stop_words_ids": [[]]},
        {"bad_words_ids": [[1], []]},
        {"seed": -1},
        {"seed": 2**64},
        {"logprobs": -1},
        {"prompt_logprobs": -2},
        {"stop": "x", "detokenize": False},
    ],
    ids=str,
)
def test_parameters_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="|".join(options)):
        SamplingParams(**options)


def test_tokens_that_are_no_numbers_leave_nothing_behind(llm: LLM) -> None:
    wrong: Any = [[5, 6], [5, "six"]]
    with pytest.raises(InvalidRequestError, match=r"^prompts\[1\] has 'six' at position 1"):
        llm.generate(wrong, GREEDY)
    assert not llm.engine.has_unfinished
    assert tokens_of(llm.generate(PROMPTS[0], GREEDY))


def test_refusing_a_long_list_takes_no_longer_than_reading_it(llm: LLM) -> None:
    start = time.process_time()
    with pytest.raises(InvalidRequestError, match="no tokens"):
        llm.generate([*[[5, 6]] * 10_000, []], GREEDY)
    assert time.process_time() - start < 2  # 0.2 s here; 10,000 walks over the list took 80 s


def test_the_same_id_twice(llm: LLM) -> None:
    from hasten.core.types import Request

    request = Request(request_id="mine", prompt_token_ids=(5, 6), params=GREEDY)
    llm.engine.add(request)
    with pytest.raises(InvalidRequestError, match="'mine' is in use"):
        llm.engine.add(request)
    output = llm.engine.abort("mine")
    assert output is not None
    assert [(c.finish_reason, c.token_ids) for c in output.outputs] == [(FinishReason.ABORT, [])]
    assert llm.engine.abort("mine") is None


def test_a_withdrawn_request_says_what_it_had(llm: LLM) -> None:
    from hasten.core.types import Request

    llm.engine.add(Request(request_id="mine", prompt_token_ids=tuple(PROMPTS[4]), params=GREEDY))
    for _ in range(4):
        assert llm.engine.step() == []
    output = llm.engine.abort("mine")
    assert output is not None
    assert [c.finish_reason for c in output.outputs] == [FinishReason.ABORT]
    known = 3 if llm.engine.worker.overlap else 4  # the fourth is still on the device
    assert tokens_of([output]) == [tokens[:known] for tokens in tokens_of(llm.generate(PROMPTS[4], GREEDY))]
    assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)


def test_without_a_tokenizer(tiny_bloom: Path, tmp_path: Path) -> None:
    for file in tiny_bloom.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with LLM(tmp_path) as llm:
        result = llm.generate(PROMPTS[1], SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1))[0].outputs[0]
        assert (result.text, len(result.token_ids)) == ("", 3)
        with pytest.raises(ConfigError, match="no tokenizer"):
            llm.generate("text")
        with pytest.raises(InvalidRequestError, match="need a tokenizer"):
            llm.generate(PROMPTS[1], SamplingParams(stop="x"))
    with LLM(tmp_path, tokenizer=str(tiny_bloom)) as llm:
        assert llm.generate("text", GREEDY)[0].outputs[0].text


def test_options_that_make_no_sense(tiny_bloom: Path) -> None:
    for options, message in (
        ({"max_seqs": 3}, "unknown engine option max_seqs"),
        ({"dtype": "int8"}, "data type 'int8' is not known"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens 8 is below max_num_seqs 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(tiny_bloom, **options)


def test_a_cache_that_is_too_small_says_what_to_lower(tiny_bloom: Path) -> None:
    with pytest.raises(ConfigError, match=r"room for 0 tokens.*lower max_model_len or raise kv_cache_memory"):
        LLM(tiny_bloom, kv_cache_memory=1000)
    with pytest.raises(ConfigError, match=r"room for 32 tokens.*100; lower max_model_len or raise kv_cache_memory"):
        LLM(tiny_bloom, **cache_of(2, tiny_bloom), max_model_len=100)
    with LLM(tiny_bloom, **cache_of(2, tiny_bloom)) as llm:
        with pytest.raises(InvalidRequestError, match=r"longest sequence of 32 \(max_model_len\)"):
            llm.generate([5] * 40)
        result = llm.generate([[5] * 31, [6] * 5], GREEDY)
        assert [len(tokens) for tokens in tokens_of(result)] == [1, COUNT]
        assert used(llm) == 0


def test_nothing_after_close(tiny_bloom: Path) -> None:
    llm = LLM(tiny_bloom)
    engine = llm.engine
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        next(stream)
    for call in (lambda: llm.generate(PROMPTS[0]), lambda: next(llm.stream(PROMPTS[0])), lambda: llm.tokenizer):
        with pytest.raises(EngineError, match="closed"):
            call()
    with pytest.raises(EngineError, match="closed"):
        engine.step()


# --- values that overflow ---------------------------------------------------------------------------------------------

POISON = 77


@pytest.fixture
def poisoned(tiny_bloom_untied: Path) -> Iterator[Callable[..., LLM]]:
    """A model in which one token's hidden state is not a number."""
    opened: list[LLM] = []

    def make(**options: Any) -> LLM:
        llm = LLM(tiny_bloom_untied, **options)
        opened.append(llm)
        model: Any = llm.engine.worker.runner.model
        model.embedding.weight[POISON] = float("nan")
        return llm

    yield make
    for llm in opened:
        assert used(llm) == 0
        llm.close()


def finite(prompts: list[list[int]]) -> list[list[int]]:
    return [[token if token != POISON else 78 for token in prompt] for prompt in prompts]


HEALTHY = finite(PROMPTS)
POISONED = [[POISON], [5, POISON, 6], [*HEALTHY[-1][:40], POISON, *HEALTHY[-1][40:]], [POISON] * 33]
CAREFUL = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, bad_words_ids=[[POISON]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"enable_prefix_caching": False},
        {"overlap_steps": True},
        {"overlap_steps": True, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    ],
    ids=str,
)
def test_a_request_that_overflows_ends_alone(poisoned: Callable[..., LLM], options: dict[str, Any]) -> None:
    llm = poisoned(**options)
    right = tokens_of(llm.generate(HEALTHY, CAREFUL))
    for _ in range(2):
        outputs = llm.generate([*POISONED[:2], *HEALTHY, *POISONED[2:], *HEALTHY], CAREFUL)
        bad = [*outputs[:2], *outputs[2 + len(HEALTHY) : 4 + len(HEALTHY)]]
        for output in bad:
            completion = output.outputs[0]
            assert (completion.finish_reason, completion.token_ids) == (FinishReason.ERROR, [])
            assert "not finite" in str(completion.stop_reason)
        assert tokens_of([output for output in outputs if output not in bad]) == right * 2
        assert tokens_of(llm.generate(HEALTHY, CAREFUL)) == right
    assert used(llm) == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_all_completions_of_a_request_that_overflows_end(poisoned: Callable[..., LLM], overlap: bool) -> None:
    llm = poisoned(overlap_steps=overlap)
    right = tokens_of(llm.generate(HEALTHY, CAREFUL))
    several = SamplingParams(n=3, seed=1, max_tokens=COUNT)
    outputs = llm.generate([POISONED[2], *HEALTHY], [several, *[CAREFUL] * len(HEALTHY)])
    assert [completion.finish_reason for completion in outputs[0].outputs] == [FinishReason.ERROR] * 3
    assert tokens_of(outputs[1:]) == right
    assert tokens_of(llm.generate(HEALTHY, CAREFUL)) == right


def test_a_request_that_overflows_and_is_withdrawn_before_anyone_sees(poisoned: Callable[..., LLM]) -> None:
    llm = poisoned(max_num_batched_tokens=16, max_num_seqs=16, kv_cache_memory=1 << 18)
    right = tokens_of(llm.generate(HEALTHY, CAREFUL))
    for _ in range(3):
        stream = llm.stream([HEALTHY[0], [POISON] * 100], CAREFUL)
        for _ in range(3):
            next(stream)
        assert any(POISON in s.token_ids and s.num_computed > 16 for s in llm.engine.scheduler.running)
        stream.close()  # type: ignore[attr-defined]
        assert tokens_of(llm.generate(HEALTHY, CAREFUL)) == right


def test_a_request_that_overflows_and_is_preempted_before_anyone_sees(poisoned: Callable[..., LLM]) -> None:
    llm = poisoned(max_num_batched_tokens=16, max_num_seqs=16)
    right = tokens_of(llm.generate(HEALTHY[:4], CAREFUL))
    short = poisoned(max_num_batched_tokens=16, max_num_seqs=16, **cache_of(8, Path(llm.engine.config.model)))
    outputs = short.generate([*HEALTHY[:4], [POISON] * 100], CAREFUL)
    assert preemptions(short) > 0
    assert outputs[-1].outputs[0].finish_reason is FinishReason.ERROR
    assert tokens_of(outputs[:-1]) == right
    assert tokens_of(short.generate(HEALTHY[:4], CAREFUL)) == right


@pytest.mark.parametrize("end", [509, -1])
def test_an_end_token_outside_the_vocabulary_cannot_come_and_ends_nothing(
    end: int, tiny_bloom_odd_vocab: Path, tmp_path: Path
) -> None:
    """The last token of the vocabulary is what -1 would be, if it were an index."""
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_bloom_odd_vocab, tmp_path / "model"))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(values | {"eos_token_id": end}), encoding="utf-8")
    reference = AutoModelForCausalLM.from_pretrained(tiny_bloom_odd_vocab, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, eos_token_id=None, pad_token_id=3
    )[0, 3:].tolist()
    with LLM(folder, kv_cache_memory=1 << 24) as llm:
        for least in (0, 2):
            params = SamplingParams(temperature=0, max_tokens=3, min_tokens=least)
            assert tokens_of(llm.generate([[5, 6, 7]], params)) == [expected]
        biased = SamplingParams(temperature=0, max_tokens=1, min_tokens=1, logit_bias={508: 100.0})
        assert tokens_of(llm.generate([[5, 6, 7]], biased)) == [[508]]


def test_a_tokenizer_that_knows_more_tokens_than_the_model(make_bloom: Callable[..., Path], tiny_bloom: Path) -> None:
    small = make_bloom(vocab_size=300)
    with LLM(small, tokenizer=str(tiny_bloom), kv_cache_memory=1 << 24) as llm:
        with pytest.raises(InvalidRequestError, match=r"the prompt has token id \d+; the vocabulary ends at 299"):
            llm.generate("Anna opened the door", GREEDY)
        # the model cannot produce the words, and goes on
        assert max(llm.tokenizer.encode("Anna")) >= 300
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, bad_words=["Anna"])
        plain = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        assert tokens_of(llm.generate([[5, 6]], params)) == tokens_of(llm.generate([[5, 6]], plain))


def test_loading_is_logged_and_a_terminal_gets_a_bar(tiny_bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch.nn as nn
    from transformers import AutoModelForCausalLM

    reference: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_bloom, dtype=torch.float32)
    nbytes = sum(parameter.nbytes for parameter in reference.parameters())
    with caplog.at_level("INFO", logger="hasten"), LLM(tiny_bloom, kv_cache_memory=1 << 22):
        pass
    begin, end = (record.getMessage() for record in caplog.records if record.name == "hasten.engine.model_loading")
    assert begin == f"loading BloomForCausalLM (safetensors) from {tiny_bloom} to cpu"
    assert re.fullmatch(rf"loaded {nbytes / 1e9:.3f} GB of weights as torch\.float32 in \d+\.\d s", end)
    for show in (True, False):
        shown = stderr_on_a_terminal(
            f"from hasten import LLM\nLLM({str(tiny_bloom)!r}, kv_cache_memory=1 << 22, progress_bars={show})"
        )
        assert ("Loading weights" in shown) == show


def stderr_on_a_terminal(script: str) -> str:
    """What a script in a process of its own writes to its standard error, which is a terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", script], stderr=follower, env=environment)
    os.close(follower)
    shown = bytearray()
    with suppress(OSError):  # Linux reports the end of the other side as an error
        while piece := os.read(leader, 4096):
            shown += piece
    os.close(leader)
    assert process.wait(LIMIT_S) == 0, shown.decode()
    return shown.decode()


def test_a_call_that_another_thread_began_first_is_left_alone(
    tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were free to begin when they came; one tokenizes for so long that the other has requests under way."""
    began, go_on = threading.Event(), threading.Event()
    with LLM(tiny_bloom) as llm, ThreadPoolExecutor(1) as pool:
        encode_batch = llm.tokenizer.encode_batch

        def slow(texts: list[str]) -> list[list[int]]:
            began.set()
            assert go_on.wait(LIMIT_S)
            return encode_batch(texts)

        monkeypatch.setattr(llm.tokenizer, "encode_batch", slow)
        late = pool.submit(llm.generate, ["the river", "a lamp"], SamplingParams(max_tokens=4))
        assert began.wait(LIMIT_S)
        stream = llm.stream([[5, 6, 7]], SamplingParams(max_tokens=6, ignore_eos=True))
        found = [next(stream)]
        go_on.set()
        with pytest.raises(EngineError, match="another call of this LLM is under way"):
            late.result(LIMIT_S)
        found += stream
        assert [len(output.outputs[0].token_ids) for output in found] == [1, 2, 3, 4, 5, 6]
        assert not llm.engine.has_unfinished
