from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hasten.core.types import LogprobRow
from hasten.engine.batch import PromptRun
from hasten.engine.points import mix64, seeds_of, uniforms
from hasten.engine.recorded_choice import Chosen
from hasten.engine.sampler import Choice, PromptLogprobs, Sampled, Sampler
from hasten.engine.sequence import Sequence
from hasten.ops import NONE_LEFT

if TYPE_CHECKING:
    from tests.engine.conftest import MakeSequence

VOCAB = 61
EOS = (2,)

GRID: list[dict[str, Any]] = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature in (0.3, 1.0, 2.5)
    for top_k in (0, 1, 7, VOCAB, 1000)
    for top_p in (0.05, 0.8, 1.0)
    for min_p in (0.0, 0.02, 0.3)
]


def uniform(seed: int, position: int) -> float:
    return float(uniforms(seeds_of([seed]), np.array([position]))[0])


def random_logits(rows: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sampled_of(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
    choice = Sampler(EOS, logits.device).prepare(logits.clone(), sequences).choose()
    sampled = choice.collect()
    assert choice.chosen.dtype == torch.int32
    assert choice.chosen[0].tolist() == [each.token_id for each in sampled]
    return sampled


def tokens_of(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return [sampled.token_id for sampled in sampled_of(logits, sequences)]


def filtered(logits: np.ndarray[Any, Any], p: Any) -> np.ndarray[Any, Any]:
    """The distribution after temperature, min-p, top-k and top-p, in fp64 and by loops rather than by tensors."""
    scaled = logits.astype(np.float64) / p.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    probs[probs < p.min_p * probs.max()] = 0
    ordered = sorted(probs, reverse=True)
    if p.top_k > 0:
        ordered = ordered[: p.top_k]
    kept, before = [], 0.0
    for probability in ordered:
        if before < p.top_p * sum(ordered):
            kept.append(probability)
        before += probability
    probs[probs < kept[-1]] = 0
    return probs / probs.sum()


def inverted(probs: np.ndarray[Any, Any], point: float) -> int:
    return int(np.searchsorted(np.cumsum(probs), point * np.cumsum(probs)[-1], side="right"))


@pytest.mark.parametrize("params", GRID, ids=str)
def test_draws_invert_the_filtered_distribution(make_sequence: MakeSequence, params: dict[str, Any]) -> None:
    logits = random_logits(1, seed=1)
    sequences = [make_sequence([1], seed=seed, **params) for seed in range(100)]
    probs = filtered(logits[0].numpy(), sequences[0].params)
    wanted = [inverted(probs, uniform(seed, 0)) for seed in range(100)]
    assert tokens_of(logits.expand(100, -1), sequences) == wanted


@pytest.mark.parametrize("params", GRID, ids=str)
def test_the_filtered_distribution_is_that_of_transformers(make_sequence: MakeSequence, params: dict[str, Any]) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = random_logits(1, seed=2).double()
    ours = filtered(scores[0].numpy(), make_sequence([1], **params).params)
    scores = TemperatureLogitsWarper(params["temperature"])(None, scores)
    if params["min_p"]:
        scores = MinPLogitsWarper(params["min_p"])(None, scores)
    if params["top_k"]:
        scores = TopKLogitsWarper(params["top_k"])(None, scores)
    if params["top_p"] < 1:
        scores = TopPLogitsWarper(params["top_p"])(None, scores)
    theirs = scores.softmax(-1)[0].numpy()
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_frequencies_are_the_probabilities(make_sequence: MakeSequence) -> None:
    # 20,000 draws over seeds and positions: chi-square within 5 standard deviations of its mean
    logits, count = random_logits(1, seed=3, scale=1.0), 20_000
    sequences = [make_sequence([1], seed=n // 100, output=[5] * (n % 100)) for n in range(count)]
    counts = np.bincount(tokens_of(logits.expand(count, -1), sequences), minlength=VOCAB)
    wanted = filtered(logits[0].numpy(), sequences[0].params) * count
    chi_square = float(((counts - wanted) ** 2 / wanted).sum())
    freedom = VOCAB - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_uniform_numbers_are_even_and_differ_by_seed_and_position() -> None:
    numbers = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(numbers) == 2500
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2500 - 0.5) < 5 * (1 / 12 / 2500) ** 0.5
    assert len({mix64(value) for value in range(1000)}) == 1000
    assert 0 <= uniform(2**64 - 1, 10**6) < 1
    for seed, position in ((0, 0), (7, 3), (-5, 1), (2**63 + 11, 10**6), (2**64 - 1, 12)):
        assert uniform(seed, position) == (mix64(seed + position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


@pytest.mark.parametrize(("point", "wanted"), [(0.0, 7), (0.5, 30), (1 - 2.0**-53, 30)])
def test_tokens_without_probability_are_not_drawn_at_the_ends_either(
    make_sequence: MakeSequence, monkeypatch: pytest.MonkeyPatch, point: float, wanted: int
) -> None:
    monkeypatch.setattr("hasten.engine.sampled_batch.uniforms", lambda _, positions: np.full(positions.shape, point))
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [7, 30]] = 0.0
    for options in ({}, {"top_p": 0.99}, {"top_k": 40}):
        assert tokens_of(logits, [make_sequence([1], **options)]) == [wanted]


def test_a_row_does_not_depend_on_the_rest_of_the_batch(make_sequence: MakeSequence) -> None:
    rng = random.Random(4)
    logits = random_logits(80, seed=4).bfloat16().float()  # so that many logits are equal
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 5},
        {"top_k": 40, "top_p": 0.9},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 0.0},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"logprobs": 3},
        {"min_tokens": 4, "bad_words_ids": [[7], [5, 8]]},
    ]
    sequences = [
        make_sequence(rng.choices(range(VOCAB), k=5), seed=n, output=[5] * (n % 7), **options[n % len(options)])
        for n in range(80)
    ]
    alone = [sampled_of(logits[n : n + 1], [sequence])[0] for n, sequence in enumerate(sequences)]
    together = sampled_of(logits, sequences)
    assert [s.token_id for s in together] == [s.token_id for s in alone]
    assert [s.top is None for s in together] == [s.top is None for s in alone]
    part = rng.sample(range(80), 20)
    assert tokens_of(logits[part], [sequences[n] for n in part]) == [alone[n].token_id for n in part]


def test_the_same_seed_and_position_give_the_same_token_and_others_differ(make_sequence: MakeSequence) -> None:
    logits = random_logits(1, seed=5)
    drawn = [tokens_of(logits, [make_sequence([1], seed=seed)])[0] for seed in (*range(30), *range(30))]
    assert drawn[:30] == drawn[30:]
    assert len(set(drawn)) > 5
    by_position = [tokens_of(logits, [make_sequence([1], seed=0, output=[3] * n)])[0] for n in range(30)]
    assert len(set(by_position)) > 5


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-2])
def test_a_tiny_temperature_takes_the_best(make_sequence: MakeSequence, temperature: float) -> None:
    logits = random_logits(50, seed=6, scale=10.0) * 1000
    sequences = [make_sequence([1], seed=n, temperature=temperature) for n in range(50)]
    assert tokens_of(logits, sequences) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e5, 1e30])
def test_a_huge_temperature_makes_all_tokens_alike(make_sequence: MakeSequence, temperature: float) -> None:
    logits = random_logits(1, seed=7)
    drawn = tokens_of(logits.expand(300, -1), [make_sequence([1], seed=n, temperature=temperature) for n in range(300)])
    assert drawn == [int(uniform(n, 0) * VOCAB) for n in range(300)]


def test_below_the_least_temperature_it_is_greedy(make_sequence: MakeSequence) -> None:
    logits = random_logits(8, seed=8, scale=1e-6)
    for temperature in (0.0, 9e-6):
        sequences = [make_sequence([1], seed=n, temperature=temperature) for n in range(8)]
        assert tokens_of(logits, sequences) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_takes_the_first_of_equal_logits(make_sequence: MakeSequence, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, VOCAB, dtype=dtype)
    logits[0, [9, 30, 60]] = 1
    logits[1, [60, 11]] = 2
    plain = [make_sequence([1], temperature=0) for _ in range(3)]
    assert tokens_of(logits, plain) == [9, 11, 0]
    assert tokens_of(logits, [*plain[:2], make_sequence([1], temperature=0, logprobs=1)]) == [9, 11, 0]


def test_tokens_as_probable_as_the_last_one_kept_are_kept(make_sequence: MakeSequence) -> None:
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, [3, 4, 50]] = 1.0
    logits[0, 20] = 2.0
    for params in ({"top_k": 2}, {"top_p": 0.5}):
        drawn = set(tokens_of(logits.expand(200, -1), [make_sequence([1], seed=n, **params) for n in range(200)]))
        assert drawn == {3, 4, 20, 50}


def test_one_token_left_is_always_drawn(make_sequence: MakeSequence) -> None:
    logits = random_logits(40, seed=9)
    best = logits.argmax(-1).tolist()
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert tokens_of(logits, [make_sequence([1], seed=n, **params) for n in range(40)]) == best


def greedy_after(
    make_sequence: MakeSequence, logits: torch.Tensor, prompt: list[int], output: list[int], **params: Any
) -> int:
    return tokens_of(logits, [make_sequence(prompt, output=output, temperature=0, **params)])[0]


def test_repetition_penalty_is_that_of_transformers(make_sequence: MakeSequence) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = random.Random(10)
    for seed in range(60):
        logits, penalty = random_logits(1, seed), rng.choice([0.5, 1.1, 1.8, 5.0])
        prompt, output = (rng.choices(range(VOCAB), k=rng.randint(1, 40)) for _ in range(2))
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
        assert greedy_after(make_sequence, logits, prompt, output, repetition_penalty=penalty) == int(scores.argmax())


def test_presence_and_frequency_penalties_follow_their_formula_over_the_output(make_sequence: MakeSequence) -> None:
    rng = random.Random(11)
    for seed in range(60):
        logits, presence, frequency = random_logits(1, seed), rng.uniform(-2, 2), rng.uniform(-2, 2)
        prompt, output = (rng.choices(range(VOCAB), k=rng.randint(1, 60)) for _ in range(2))
        scores = [
            value - (presence if token in output else 0) - frequency * output.count(token)
            for token, value in enumerate(logits[0].tolist())
        ]
        chosen = greedy_after(
            make_sequence, logits, prompt, output, presence_penalty=presence, frequency_penalty=frequency
        )
        assert chosen == int(np.argmax(scores))


def test_penalties_also_shape_what_is_drawn_and_leave_the_logits_alone(make_sequence: MakeSequence) -> None:
    logits = random_logits(1, seed=12)
    before = logits.clone()
    seen = [3, 4, 5, 6]
    sequences = [
        make_sequence([1], seed=n, output=seen, repetition_penalty=2.0, presence_penalty=1.0) for n in range(200)
    ]
    shaped = logits[0].clone()
    for token in {1, *seen}:
        shaped[token] = shaped[token] / 2 if shaped[token] > 0 else shaped[token] * 2
    for token in seen:
        shaped[token] -= 1
    probs = filtered(shaped.numpy(), sequences[0].params)
    assert tokens_of(logits.expand(200, -1), sequences) == [inverted(probs, uniform(n, 4)) for n in range(200)]
    assert torch.equal(logits, before)


def test_a_bias_is_added_to_its_token_alone(make_sequence: MakeSequence) -> None:
    logits = random_logits(3, seed=3)
    plain = make_sequence([1], temperature=0, logprobs=2)
    biased = make_sequence([1], temperature=0, logprobs=2, logit_bias={7: 100, 9: 50})
    banned = make_sequence([1], temperature=0, logit_bias={int(logits[2].argmax()): -100})
    given = logits.clone()
    first, second, third = sampled_of(logits, [plain, biased, banned])
    assert torch.equal(logits, given)
    assert first.token_id == int(logits[0].argmax())
    assert second.token_id == 7
    assert second.top is not None
    assert LogprobRow.unpacked(second.top).logprob == pytest.approx(float(logits[1].log_softmax(-1)[7]), abs=1e-5)
    assert third.token_id == int(logits[2].topk(2).indices[1])


def test_bad_words_never_come(make_sequence: MakeSequence) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [10, 11, 12]] = torch.tensor([3.0, 2.0, 1.0])
    words = [[10], [7, 8, 11]]
    assert greedy_after(make_sequence, logits, [1], [], bad_words_ids=words) == 11
    assert greedy_after(make_sequence, logits, [1], [7, 8], bad_words_ids=words) == 12
    assert greedy_after(make_sequence, logits, [1], [7, 8, 9], bad_words_ids=words) == 11
    assert greedy_after(make_sequence, logits, [1], [8], bad_words_ids=words) == 11
    drawn = tokens_of(logits.expand(300, -1), [make_sequence([1], seed=n, bad_words_ids=words) for n in range(300)])
    assert 10 not in drawn
    assert 11 in drawn


def test_bans_of_runs_hold_before_the_last_token_is_known_here(make_sequence: MakeSequence) -> None:
    words = [[13], [9, 12], [8, 9, 11], [7, 8, 9, 10], [5, 9, 14], [9, 9, 15], [6, 8, 9, 16]]
    logits = torch.zeros(1, VOCAB)
    for last, output in ((9, [7, 8]), (4, [7, 8]), (9, []), (9, [9]), (9, [8])):
        known = make_sequence([6], output=[*output, last], temperature=0, bad_words_ids=words)
        waiting = make_sequence([6], output=output, temperature=0, bad_words_ids=words)
        waiting.pending, waiting.pending_row = 1, 2
        chosen = torch.tensor([40, 41, last, 42], dtype=torch.int32)
        sampler, banned = Sampler(EOS, logits.device), set()
        for token in range(VOCAB):  # each token in turn is the most probable one
            logits.zero_()[0, token] = 1.0
            found = [
                sampler.prepare(logits, [sequence], chosen).choose().collect()[0].token_id
                for sequence in (known, waiting)
            ]
            assert found[0] == found[1]
            if found[0] != token:
                banned.add(token)
        whole = [*output, last]
        assert banned == {
            word[-1] for word in words if whole[len(whole) - len(word) + 1 :] == word[:-1] or len(word) == 1
        }


def test_no_end_or_stop_token_before_min_tokens(make_sequence: MakeSequence) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 5, 6]] = torch.tensor([3.0, 2.0, 1.0])
    for count, wanted in ((0, 6), (1, 6), (2, 2), (3, 2)):
        output = [9] * count
        assert greedy_after(make_sequence, logits, [1], output, min_tokens=2, stop_token_ids=[5]) == wanted
    drawn = tokens_of(logits.expand(200, -1), [make_sequence([1], seed=n, min_tokens=2) for n in range(200)])
    assert 2 not in drawn


def test_logprobs_are_the_models_own(make_sequence: MakeSequence) -> None:
    logits = random_logits(6, seed=13)
    wanted = logits.log_softmax(-1)
    sequences = [
        make_sequence([1], seed=n, logprobs=count, temperature=0.5, top_k=9, repetition_penalty=1.5)
        for n, count in enumerate((0, 1, 3, 5, VOCAB, VOCAB + 9))
    ]
    for row, (sampled, sequence) in enumerate(zip(sampled_of(logits, sequences), sequences, strict=True)):
        assert sampled.top is not None
        requested = sequence.params.logprobs or 0
        best = wanted[row].argsort(descending=True).tolist()
        top = LogprobRow.unpacked(sampled.top)
        entries = top.entries()
        assert next(iter(entries)) == sampled.token_id
        assert set(entries) == {sampled.token_id, *best[:requested]}
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(float(wanted[row, token]), abs=1e-6)
            assert entry.rank == best.index(token) + 1
        assert top.logprob == entries[sampled.token_id].logprob


def test_only_rows_that_ask_get_logprobs(make_sequence: MakeSequence) -> None:
    sequences = [make_sequence([1], temperature=0, logprobs=2), make_sequence([1]), make_sequence([1], temperature=0)]
    tops = [sampled.top for sampled in sampled_of(random_logits(3, seed=14), sequences)]
    assert [top is None for top in tops] == [False, True, True]


def test_prompt_logprobs_are_those_of_the_tokens_that_follow(make_sequence: MakeSequence) -> None:
    tokens = [4, 0, 3, 1, 3]
    each, other = make_sequence(tokens, prompt_logprobs=0), make_sequence(tokens[:3], prompt_logprobs=2)
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, 1.0]]).expand(8, -1)
    prompts = PromptLogprobs([PromptRun(each, 0, range(5)), PromptRun(other, 0, range(5, 8))])
    assert not prompts
    prompts.add(slice(0, 3), logits[:3])
    prompts.add(slice(3, 8), logits[:5])
    runs = list(prompts.collect())
    found = [
        (sequence, at, LogprobRow.unpacked(row).entries())
        for sequence, first, rows in runs
        for at, row in enumerate(rows, first)
    ]
    assert [(sequence is each, at) for sequence, at, _ in found] == [
        *((True, at) for at in range(4)),
        *((False, at) for at in range(2)),
    ]
    assert [next(iter(top)) for _, _, top in found] == [*tokens[1:], *tokens[1:3]]
    assert [top[token].rank for (_, _, top), token in zip(found, [*tokens[1:], *tokens[1:3]], strict=True)] == [
        5,
        2,
        1,
        2,
        5,
        2,
    ]
    assert [list(top) for _, _, top in found[:4]] == [[token] for token in tokens[1:]]
    assert [list(top) for _, _, top in found[4:]] == [[0, 1, 3], [3, 1]]
    wanted = logits[0].log_softmax(-1)
    assert all(abs(entry.logprob - float(wanted[token])) < 1e-6 for *_, top in found for token, entry in top.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3, "logprobs": 2}], ids=str)
def test_a_row_that_is_not_finite_is_an_error_and_the_others_are_not(
    make_sequence: MakeSequence, value: float, options: dict[str, Any]
) -> None:
    logits = random_logits(5, seed=15)
    sequences = [make_sequence([1], seed=n, **options) for n in range(5)]
    right = tokens_of(logits, sequences)
    logits[1, 40] = value
    logits[3] = value
    sampled = sampled_of(logits, sequences)
    assert [s.token_id for s in sampled] == [right[0], -1, right[2], -1, right[4]]
    errors = [s.error for s in sampled]
    assert errors[::2] == [None] * 3
    assert all(error is not None and "not finite" in error and "bf16 or fp32" in error for error in errors[1::2])
    assert sampled[1].top is None


def test_minus_infinity_is_a_token_that_cannot_come(make_sequence: MakeSequence) -> None:
    logits = torch.full((100, VOCAB), float("-inf"))
    logits[:, [4, 9]] = 0.0
    for options in ({}, {"top_p": 0.9}, {"top_k": 30, "min_p": 0.5}):
        sampled = sampled_of(logits, [make_sequence([1], seed=n, **options) for n in range(100)])
        assert {s.token_id for s in sampled} == {4, 9}
        assert all(s.error is None for s in sampled)


def test_tokens_chosen_elsewhere() -> None:
    found = Choice(Chosen(torch.tensor([4, -1, 0], dtype=torch.int32))).collect()
    assert [each.token_id for each in found] == [4, -1, 0]
    assert [each.error is None for each in found] == [True, False, True]
    assert all(each.top is None for each in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_penalties_are_computed_in_fp32(make_sequence: MakeSequence, dtype: torch.dtype) -> None:
    logits = torch.zeros(1, VOCAB, dtype=dtype)
    logits[0, [5, 6]] = torch.tensor([8.0, 7.96875], dtype=dtype)
    for penalty, wanted in ((1.003, 5), (1.005, 6)):
        sequence = make_sequence([5], temperature=0, repetition_penalty=penalty)
        assert tokens_of(logits, [sequence]) == [wanted]
    assert logits[0, 5] == 8


def test_allowed_tokens_are_the_only_ones(make_sequence: MakeSequence) -> None:
    logits = random_logits(3, seed=5)
    allowed = [4, 9, 50]
    sequences = [
        make_sequence([1], temperature=0, allowed_token_ids=allowed),
        make_sequence([1], temperature=0),
        make_sequence([1], seed=3, allowed_token_ids=[7], logprobs=1),
    ]
    best = allowed[int(logits[0, allowed].argmax())]
    assert tokens_of(logits, sequences) == [best, int(logits[1].argmax()), 7]


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[token] for token in range(VOCAB)]},
        {"allowed_token_ids": [5], "bad_words_ids": [[5]]},
        {"allowed_token_ids": [2], "min_tokens": 1},
        {"bad_words_ids": [[token] for token in range(VOCAB)], "temperature": 1.0, "logprobs": 2},
        {"bad_words_ids": [[token] for token in range(VOCAB)], "temperature": 1.0, "beam_width": 2},
    ],
)
def test_a_request_that_excludes_all_tokens_is_told_so(make_sequence: MakeSequence, options: dict[str, Any]) -> None:
    """And one whose logits overflow, with or without bans, is not."""
    logits = random_logits(3, seed=6)
    logits[2] = float("nan")
    sequences = [make_sequence([1], **{"temperature": 0.0, **options}), make_sequence([1], temperature=0)]
    sequences.append(make_sequence([1], temperature=0, bad_words_ids=[[3]]))
    excluded, plain, overflown = Sampler(EOS, logits.device).prepare(logits, sequences).choose().collect()
    assert (excluded.token_id, plain.error, overflown.token_id) == (NONE_LEFT, None, -1)
    assert excluded.error is not None
    assert excluded.error.startswith("no token may come next")
    assert overflown.error is not None
    assert "not finite" in overflown.error


RECORDED: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "everything": {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.3, "logprobs": 3, "logit_bias": {3: 2.0}},
    "bans": {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": [1, 2], "bad_words_ids": [[5], [7, 8]]},
    "allowed": {"temperature": 0.9, "allowed_token_ids": list(range(3, 30)), "logprobs": 0},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_choices_are_those_of_their_ops(make_sequence: MakeSequence, name: str) -> None:
    pytest.importorskip("numba", reason="there are no recordings without it")
    options = RECORDED[name]
    sequences = [make_sequence([1, 2 + row], seed=row, **options) for row in range(5)]
    sampler, logits = Sampler((2,), torch.device("cpu")), torch.empty(5, VOCAB)
    was_recorded = []
    for step in range(9):
        if step == 6:  # tokens that nobody chose
            for sequence in sequences:
                sequence.token_ids += [9, 9]
        logits.copy_(random_logits(5, seed=step))
        expected = Sampler((2,), torch.device("cpu")).prepare(logits.clone(), sequences).choose().collect()
        found = sampler.prepare(logits, sequences).choose().collect()
        assert found == expected
        assert sampler._batch is not None
        was_recorded.append(sampler._batch.recorded._recorded is not None)
        for sequence, sampled in zip(sequences, found, strict=True):
            sequence.append(sampled.token_id)
    assert any(was_recorded[1:6])
    alone = sampler.prepare(logits[:1], sequences[:1]).choose().collect()
    assert alone == Sampler((2,), torch.device("cpu")).prepare(logits[:1].clone(), sequences[:1]).choose().collect()


def test_what_a_recorded_choice_gave_stays_as_it_is(make_sequence: MakeSequence) -> None:
    sequences = [make_sequence([1], seed=row, logprobs=2) for row in range(3)]
    sampler, logits, choices = Sampler((2,), torch.device("cpu")), torch.empty(3, VOCAB), []
    for step in range(5):
        logits.copy_(random_logits(3, seed=step))
        choices.append((sampler.prepare(logits, sequences).choose(), logits.clone()))
    for choice, of in choices:
        assert choice.collect() == Sampler((2,), torch.device("cpu")).prepare(of, sequences).choose().collect()
