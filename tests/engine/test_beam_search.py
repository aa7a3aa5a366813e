"""Beam search with real models: the same beams as transformers'."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from hasten import LLM, FinishReason, InvalidRequestError, RequestOutput, SamplingParams
from hasten.core.types import Request
from hasten.engine.batch import Batch

if TYPE_CHECKING:
    from tests.engine.conftest import Reference

MakeBloom = Callable[..., Path]
Beams = list[tuple[list[int], float]]
"""Tokens and score of each, best first."""

LENGTHS = (1, 2, 15, 16, 17, 33, 70, 40)
COUNT = 20
CLOSE = 1e-4
EOS = list(range(100, 140))
"""Enough that beams of these models end early, and at different lengths."""
BIASES = {token: 3.0 - 0.4 * (token % 20) for token in range(90, 130)}
EVERYTHING: dict[str, Any] = {
    **{"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": BIASES},
    "min_tokens": 3,
}


def random_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 490) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts()
OTHERS = random_prompts((3, 30, 18), seed=1)
OTHER_PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(seed=3, max_tokens=15, n=2, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=25, logprobs=2, ignore_eos=True),
]


def beam_params() -> list[SamplingParams]:
    """One for each prompt: widths 2 to 5, all kinds of endings, and one with all that changes log-probabilities."""
    kinds: list[dict[str, Any]] = [
        {"beam_width": 2, "n": 2},
        {"beam_width": 3, "n": 1, "early_stopping": True},
        {"beam_width": 4, "n": 4, "length_penalty": 2.0, "early_stopping": True},
        {"beam_width": 5, "n": 5, "length_penalty": 0.0},
        {"beam_width": 5, "n": 3, "length_penalty": 0.6, "early_stopping": True},
        {"beam_width": 4, "n": 2, "length_penalty": -1.0},
        {"beam_width": 3, "n": 3, **EVERYTHING, "bad_words_ids": [[91], [90, 92]]},
        {"beam_width": 2, "n": 1, "length_penalty": 1.5},
    ]
    return [SamplingParams(max_tokens=COUNT, stop_token_ids=EOS, **kind) for kind in kinds]


def wanted(reference: Reference, prompt: list[int], params: SamplingParams, eos: tuple[int, ...] = (2,)) -> Beams:
    """What transformers makes of it."""
    ids = torch.tensor([prompt])
    ends = [*eos, *params.stop_token_ids]

    def edited(ids_bt: Tensor, scores_bv: Tensor) -> Tensor:
        """What transformers has no option for."""
        scores_bv = scores_bv.clone()
        for row, output in zip(scores_bv, ids_bt[:, len(prompt) :].tolist(), strict=True):
            for token, count in Counter(output).items():
                row[token] -= params.presence_penalty + params.frequency_penalty * count
            for token, bias in params.logit_bias.items():
                row[token] += bias
        if params.allowed_token_ids:
            banned = sorted(set(range(scores_bv.shape[1])) - set(params.allowed_token_ids))
            scores_bv[:, banned] = float("-inf")
        return scores_bv

    result = reference.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=params.beam_width,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens or None,
        repetition_penalty=params.repetition_penalty,
        bad_words_ids=[list(word) for word in params.bad_words_ids] or None,
        eos_token_id=ends,
        pad_token_id=3,
        logits_processor=LogitsProcessorList([edited]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for tokens, score in zip(
        result.sequences[:, len(prompt) :].tolist(), result.sequences_scores.tolist(), strict=True
    ):
        length = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
        beams.append((tokens[:length], score))
    return beams


def assert_same(output: RequestOutput, right: Beams) -> None:
    assert output.finished
    assert [completion.index for completion in output.outputs] == list(range(len(right)))
    assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _ in right]


def assert_beams(output: RequestOutput, right: Beams, params: SamplingParams, eos: tuple[int, ...] = (2,)) -> None:
    """Tokens, scores and reasons."""
    assert_same(output, right)
    for completion, (tokens, score) in zip(output.outputs, right, strict=True):
        assert completion.cumulative_logprob is not None
        divisor = len(tokens) ** params.length_penalty
        # a penalty below 0 multiplies the sum, and its rounding too
        assert abs(completion.cumulative_logprob / divisor - score) < CLOSE * max(1, 1 / divisor)
        stopped = tokens[-1] in params.stop_token_ids
        ended = stopped or tokens[-1] in eos
        assert completion.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert completion.stop_reason == (tokens[-1] if stopped else None)


def cache_of(blocks: int, folder: Path) -> int:
    """`kv_cache_memory` of so many blocks."""
    with LLM(folder, kv_cache_memory=1 << 24) as llm:
        return blocks * llm.engine.worker.runner.block_bytes


@pytest.fixture(scope="module")
def bloom(make_bloom: MakeBloom) -> Path:
    """With a head of its own: tied to the embedding, a random model mostly repeats the last token."""
    return make_bloom(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def right(bloom: Path, reference: Callable[[Path], Reference]) -> list[Beams]:
    model = reference(bloom)
    return [wanted(model, prompt, params) for prompt, params in zip(PROMPTS, beam_params(), strict=True)]


@pytest.fixture(scope="module")
def right_others(bloom: Path) -> list[list[int]]:
    with LLM(bloom, overlap_steps=False) as llm:
        outputs = llm.generate(OTHERS, OTHER_PARAMS)
    return [completion.token_ids for output in outputs for completion in output.outputs]


def test_the_beams_of_these_tests_end_at_different_times(right: list[Beams]) -> None:
    """All else here shows little if they do not."""
    lengths = [{len(tokens) for tokens, _ in beams} for beams in right]
    assert sum(len(each) > 1 for each in lengths) >= 3
    assert sum(each == {COUNT} for each in lengths) >= 1
    ends = [tokens[-1] in EOS for beams in right for tokens, _ in beams]
    assert min(ends.count(True), ends.count(False)) >= 4


def assert_all(llm: LLM, right: list[Beams], right_others: list[list[int]]) -> int:
    """Beams beside sequences of all kinds, and alone; how many searches were preempted in the second case."""
    mixed = llm.generate([*OTHERS, *PROMPTS], [*OTHER_PARAMS, *beam_params()])
    found = [completion.token_ids for output in mixed[: len(OTHERS)] for completion in output.outputs]
    assert found == right_others
    before = llm.engine.scheduler.stats.preemptions
    again = llm.generate(PROMPTS, beam_params())  # out of the prefix cache, where there is one
    for outputs in (mixed[len(OTHERS) :], again):
        for output, beams, params in zip(outputs, right, beam_params(), strict=True):
            assert_beams(output, beams, params)
    assert llm.engine.scheduler.blocks.num_used == 0
    assert not llm.engine.scheduler.has_work
    assert llm.engine.requests.owners == {}
    assert not llm.engine._flights
    return llm.engine.scheduler.stats.preemptions - before


@pytest.mark.any_python
@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 6},
        {"max_num_batched_tokens": 5, "max_num_seqs": 5, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 24, "max_num_seqs": 16, "enable_prefix_caching": False, "block_size": 5},
        {"block_size": 1},
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(
    options: dict[str, Any], overlap: bool, bloom: Path, right: list[Beams], right_others: list[list[int]]
) -> None:
    with LLM(bloom, overlap_steps=overlap, kv_cache_memory=1 << 24, **options) as llm:
        assert_all(llm, right, right_others)
        assert llm.engine.scheduler.stats.preemptions == 0


@pytest.mark.any_python
@pytest.mark.parametrize(
    ("options", "prefix_cache", "overlap"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"max_num_batched_tokens": 18, "max_num_seqs": 18}, False, True),
        ({"max_num_batched_tokens": 18, "max_num_seqs": 18}, True, False),
    ],
    ids=str,
)
def test_preempted_beams_are_the_same(
    options: dict[str, Any],
    prefix_cache: bool,
    overlap: bool,
    bloom: Path,
    right: list[Beams],
    right_others: list[list[int]],
) -> None:
    tight: dict[str, Any] = {
        "kv_cache_memory": cache_of(14, bloom),
        "enable_prefix_caching": prefix_cache,
        "overlap_steps": overlap,
    }
    with LLM(bloom, **tight, **options) as llm:
        preempted = assert_all(llm, right, right_others)
        assert preempted >= 3


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
def test_beams_of_two_ranks_are_the_same(
    overlap: bool,
    bloom: Path,
    right: list[Beams],
    right_others: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = cache_of(14, bloom) // 2  # a rank's blocks are half as large
    options: dict[str, Any] = {
        "kv_cache_memory": memory,
        "max_num_batched_tokens": 30,
        "max_num_seqs": 20,
        "overlap_steps": overlap,
        "itl_target": 1e-3,
    }
    with LLM(bloom, tensor_parallel_size=2, device="cpu", **options) as llm:
        limits = itertools.cycle([None, 3, 11])
        monkeypatch.setattr(llm.engine._pacer, "prompt_tokens", lambda *_: next(limits))  # the other rank is told
        preempted = assert_all(llm, right, right_others)
        assert preempted >= 3
        stream = llm.stream(PROMPTS, beam_params())
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert llm.engine.scheduler.blocks.num_used == 0
        assert_all(llm, right, right_others)


@pytest.mark.any_python
@pytest.mark.parametrize("early", [False, True])
def test_the_models_own_end_token(early: bool, make_bloom: MakeBloom, reference: Callable[[Path], Reference]) -> None:
    folder = make_bloom(tie_word_embeddings=False, eos_token_id=EOS)
    params = SamplingParams(beam_width=3, n=3, max_tokens=COUNT, early_stopping=early, length_penalty=0.5)
    going_on = SamplingParams(beam_width=3, n=3, max_tokens=COUNT, ignore_eos=True)
    hidden = 0
    with LLM(folder) as llm:
        for prompt in PROMPTS:
            output, without = llm.generate([prompt] * 2, [params, going_on])
            assert_beams(output, wanted(reference(folder), prompt, params, tuple(EOS)), params, tuple(EOS))
            assert all(len(completion.token_ids) == COUNT for completion in without.outputs)
            for completion in output.outputs:
                ended = completion.finish_reason is FinishReason.STOP
                assert completion.text == llm.tokenizer.decode(completion.token_ids[: -1 if ended else None])
                hidden += ended
        assert llm.engine.scheduler.blocks.num_used == 0
    assert hidden > 4


@pytest.mark.any_python
@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
@pytest.mark.parametrize(
    "options",
    [
        {"min_tokens": 6},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        *({"bad_words_ids": length} for length in (1, 2, 3)),
        {"logit_bias": BIASES},
        {"allowed_token_ids": range(90, 180)},
        {**EVERYTHING, "allowed_token_ids": range(90, 180), "bad_words_ids": 2},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_changes_log_probabilities_acts_before_the_choice(
    options: dict[str, Any], overlap: bool, bloom: Path, reference: Callable[[Path], Reference]
) -> None:
    """`bad_words_ids`: the first tokens of completions that are found without."""
    plain: dict[str, Any] = {"beam_width": 4, "n": 4, "max_tokens": 12, "length_penalty": 0.0, "stop_token_ids": EOS}
    changed = 0
    with LLM(bloom, overlap_steps=overlap) as llm:
        before = llm.generate(PROMPTS, SamplingParams(**plain))
        if length := options.get("bad_words_ids"):
            found = [completion.token_ids[:length] for output in before[:5] for completion in output.outputs]
            # transformers never bans an end token
            options = {"bad_words_ids": [each for each in found if len(each) == length and each[-1] not in EOS]}
            assert options["bad_words_ids"]
        params = SamplingParams(**plain, **options)
        after = llm.generate(PROMPTS, params)
    for prompt, output, without in zip(PROMPTS, after, before, strict=True):
        assert_beams(output, wanted(reference(bloom), prompt, params), params)
        changed += [c.token_ids for c in output.outputs] != [c.token_ids for c in without.outputs]
    assert changed > 0


@pytest.mark.any_python
@pytest.mark.parametrize(
    "options", [{}, {**EVERYTHING, "bad_words_ids": [[95], [96, 97]]}], ids=["plain", "everything"]
)
def test_many_beams_are_those_of_transformers(
    options: dict[str, Any], bloom: Path, reference: Callable[[Path], Reference]
) -> None:
    widths = [17, 64]
    params = [SamplingParams(beam_width=width, n=width, max_tokens=5, **options) for width in widths]
    with LLM(bloom) as llm:
        for each, output in zip(params, llm.generate([PROMPTS[5]] * 2, params), strict=True):
            assert_beams(output, wanted(reference(bloom), PROMPTS[5], each), each)


def test_a_search_without_any_continuation_says_so(bloom: Path) -> None:
    nothing = SamplingParams(beam_width=3, max_tokens=4, bad_words_ids=[[token] for token in range(493)])
    with LLM(bloom) as llm:
        bad, good = llm.generate([PROMPTS[3]] * 2, [nothing, SamplingParams(beam_width=3, max_tokens=4)])
        assert "no token may come next" in str(bad.outputs[0].stop_reason)
        assert good.outputs[0].finish_reason is FinishReason.LENGTH


def test_great_diversity_lets_each_beam_go_on_greedily(bloom: Path, reference: Callable[[Path], Reference]) -> None:
    width, count = 4, 8
    params = SamplingParams(
        beam_width=width, n=width, max_tokens=count, ignore_eos=True, beam_search_diversity_rate=1e6
    )
    with LLM(bloom) as llm:
        for prompt in PROMPTS[2:5]:
            first = reference(bloom).logprobs(prompt)[-1].topk(width).indices.tolist()
            greedy = [[token, *reference(bloom).greedy([*prompt, token], count - 1)] for token in first]
            found = llm.generate(prompt, params)[0].outputs
            assert sorted(completion.token_ids for completion in found) == sorted(greedy)
            for completion in found:
                each = reference(bloom).logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
                total = each.gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).sum()
                assert completion.cumulative_logprob == pytest.approx(float(total), abs=CLOSE)


def test_beams_share_the_prompts_blocks(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(bloom) as llm:
        scheduler, used = llm.engine.scheduler, list[int]()
        schedule = scheduler.schedule

        def watched(prompt_tokens: int | None = None) -> Batch:
            batch = schedule(prompt_tokens)
            used.append(scheduler.blocks.num_used)
            return batch

        monkeypatch.setattr(scheduler, "schedule", watched)
        llm.generate([PROMPTS[6]], SamplingParams(beam_width=5, max_tokens=6, ignore_eos=True))
        assert max(used) == 70 // 16 + 5  # 4 full blocks once, and for each beam the one that it writes


def test_streams_have_the_beams_once_they_are_known(bloom: Path, right: list[Beams]) -> None:
    with LLM(bloom) as llm:
        outputs = list(llm.stream(PROMPTS, beam_params()))
        assert len(outputs) == len(PROMPTS)
        for output in outputs:
            assert_same(output, right[int(output.request_id)])


@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
def test_a_withdrawn_request_has_its_beams_so_far(overlap: bool, bloom: Path) -> None:
    params = SamplingParams(beam_width=3, n=2, max_tokens=30, ignore_eos=True)
    with LLM(bloom, overlap_steps=overlap) as llm:
        for steps in range(5):
            llm.engine.add(Request(request_id="mine", prompt_token_ids=(5, 6), params=params))
            for _ in range(steps):
                assert llm.engine.step() == []
            output = llm.engine.abort("mine")
            assert output is not None
            known = max(0, steps - overlap)
            assert [len(c.token_ids) for c in output.outputs] == [known] * (2 if known else 0)
            assert all(c.finish_reason is FinishReason.ABORT for c in output.outputs)
            assert all(c.text == llm.tokenizer.decode(c.token_ids) for c in output.outputs)
            assert llm.engine.scheduler.blocks.num_used == 0
            assert llm.engine.requests.owners == {}
        assert llm.generate([5, 6], params)[0].finished


def test_prompt_logprobs_beside_beams(bloom: Path) -> None:
    with LLM(bloom) as llm:
        options: dict[str, Any] = {"prompt_logprobs": 1, "max_tokens": 3, "ignore_eos": True}
        item, beams = llm.generate(
            [PROMPTS[4]] * 2, [SamplingParams(**options), SamplingParams(beam_width=3, **options)]
        )
        assert item.prompt_logprobs is not None
        assert beams.prompt_logprobs is not None
        assert len(beams.prompt_logprobs) == len(PROMPTS[4])
        for a, b in zip(item.prompt_logprobs[1:], beams.prompt_logprobs[1:], strict=True):
            assert a is not None
            assert b is not None
            assert {token: entry.rank for token, entry in a.items()} == {
                token: entry.rank for token, entry in b.items()
            }


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ({"max_num_seqs": 3}, {"beam_width": 4}, "beam_width is 4.*3.*max_num_seqs"),
        ({}, {"beam_width": 250}, "beam_width is 250.*500.*493"),
        ({}, {"beam_width": 4, "allowed_token_ids": [2, 5, 6, 7]}, "beam_width is 4; allowed_token_ids has 3 tokens"),
        ({"blocks": 8}, {"beam_width": 4, "max_tokens": 40}, "4 beams of 60 tokens may need 13 cache blocks.*8"),
    ],
    ids=["seqs", "vocabulary", "allowed", "blocks"],
)
def test_beams_that_cannot_run_together_are_refused(
    engine: dict[str, Any], options: dict[str, Any], message: str, bloom: Path
) -> None:
    blocks: dict[str, Any] = {"kv_cache_memory": cache_of(engine["blocks"], bloom)} if "blocks" in engine else {}
    with LLM(bloom, **{key: value for key, value in engine.items() if key != "blocks"}, **blocks) as llm:
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate([[5] * 20], SamplingParams(**options))
        assert llm.generate([5, 6], SamplingParams(beam_width=2, max_tokens=3))[0].finished
        assert llm.engine.scheduler.blocks.num_used == 0


def test_a_search_that_overflows_ends_alone(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(beam_width=3, n=3, max_tokens=8, ignore_eos=True)
    with LLM(bloom) as llm:
        right = llm.generate(PROMPTS[2], params)[0].outputs
        logits = llm.engine.worker.runner.logits
        steps = 0

        def poisoned(*given: Any) -> Any:
            nonlocal steps
            steps += 1
            result = logits(*given)
            assert result is not None
            if steps == 4:
                result[1] = float("nan")  # the second of the first request's beams
            return result

        monkeypatch.setattr(llm.engine.worker.runner, "logits", poisoned)
        bad, good = llm.generate([PROMPTS[3], PROMPTS[2]], params)
        assert [c.finish_reason for c in bad.outputs] == [FinishReason.ERROR] * 3
        assert all("not finite" in str(c.stop_reason) and len(c.token_ids) == 3 for c in bad.outputs)
        assert [c.token_ids for c in good.outputs] == [c.token_ids for c in right]
        assert llm.engine.scheduler.blocks.num_used == 0
