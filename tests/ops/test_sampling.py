"""Shapes: r rows, v vocabulary. The kernels run on a GPU where there is one, and on Triton's interpreter otherwise."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hasten import ops
from hasten.ops import native, reference
from hasten.ops.cpu import sampling as cpu_sampling

pytest.importorskip("triton")

from hasten.ops.gpu import cuts, draw, sampling

DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
BELOW_ONE = 1 - 2.0**-53
VOCAB = 1300
BLOCK = 1024
"""Logits that the kernels look at together here: the vocabulary is one block and a part of another.

Small, as are the numbers of rows below: the interpreter takes a millisecond for a block.
"""

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB - 1},
    {"top_k": 2 * VOCAB},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.01},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_k": 12, "top_p": 0.7, "min_p": 0.01},
    {"top_k": 3, "top_p": 0.999, "min_p": 0.9},
]


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def no_kernels_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU computes with them is compared with the definition in `test_native.py`."""
    monkeypatch.setattr(native, "kernels", lambda: None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "BLOCK", BLOCK)
    monkeypatch.setattr(sampling, "_CHUNK", BLOCK)


def random_logits(rows: int, vocab: int = VOCAB, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def points(count: int, seed: int = 0) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def make_draws(rows: list[dict[str, Any]], at: list[float], device: torch.device | str = "cpu") -> ops.Draws:
    return ops.Draws.of(
        temperature=[row.get("temperature", 1.0) for row in rows],
        top_k=[row.get("top_k", 0) for row in rows],
        top_p=[row.get("top_p", 1.0) for row in rows],
        min_p=[row.get("min_p", 0.0) for row in rows],
        point=at,
        device=torch.device(device),
    )


def drawn(logits_rv: Tensor, rows: list[dict[str, Any]], at: list[float], device: torch.device) -> list[int]:
    """The kernel's tokens, which are other than the reference's only where a point is next to a border of the CDF."""
    found_r = draw.draw(logits_rv.to(device), make_draws(rows, at, device))
    assert found_r.dtype == torch.int32
    draws = make_draws(rows, at)
    probs_rv = reference.filtered(logits_rv, draws)
    ends_rv = probs_rv.cumsum(-1) / probs_rv.sum(-1, keepdim=True)
    found, expected = found_r.tolist(), reference.draw(logits_rv, draws).tolist()
    assert cpu_sampling.draw(logits_rv, draws).tolist() == expected
    fast_rv = reference.probabilities(logits_rv, draws)
    cpu_sampling.filter_(fast_rv, draws)
    assert torch.equal(fast_rv.nan_to_num(), probs_rv.nan_to_num())
    for row, (token, wanted) in enumerate(zip(found, expected, strict=True)):
        if token == wanted:
            continue
        assert wanted >= 0
        assert probs_rv[row, token] > 0, f"row {row} {rows[row]}: {token} was filtered out"
        between_v = ends_rv[row, min(token, wanted) : max(token, wanted)]
        assert (between_v - at[row]).abs().max() <= 1e-5, f"row {row} {rows[row]}: {token}, not {wanted}"
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, VOCAB])
@pytest.mark.parametrize("rows", [1, 9])
def test_greedy_is_that_of_the_reference(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = random_logits(rows, vocab, dtype=dtype, seed=vocab)
    found = sampling.greedy(logits.to(device)).cpu()
    assert torch.equal(found, reference.greedy(logits))
    assert torch.equal(ops.greedy(logits), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_takes_the_first_of_equals(dtype: torch.dtype, device: torch.device) -> None:
    indices = [[3, 9], [BLOCK - 1, BLOCK], [700, 1100], [0, VOCAB - 1], [VOCAB - 1], [600, 601, 20]]
    logits = torch.full((len(indices) + 2, VOCAB), -100, dtype=dtype)
    for row, tied in enumerate(indices):
        logits[row, tied] = 3.0 - row
    logits[-2:] = torch.tensor([[0.0], [-0.0]])
    logits[-2, 1:], logits[-1, 1:] = -0.0, 0.0
    wanted = [*map(min, indices), 0, 0]
    assert sampling.greedy(logits.to(device)).tolist() == wanted
    assert reference.greedy(logits).tolist() == cpu_sampling.greedy(logits).tolist() == wanted


def not_finite(dtype: torch.dtype) -> tuple[Tensor, list[bool]]:
    """Logits, and which rows of them have a token."""
    logits = random_logits(9, dtype=dtype)
    logits[1, 40] = NAN
    logits[2] = NAN
    logits[3, VOCAB - 1] = INF
    logits[4] = -INF
    logits[5, 0], logits[5, 1] = -INF, NAN
    logits[6, 1:] = -INF
    logits[7, ::2] = -INF
    logits[8, 600] = -torch.tensor(NAN)
    return logits, [True, False, False, False, False, False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_greatest_key_of_shards_is_that_of_the_row(dtype: torch.dtype, device: torch.device) -> None:
    """Shards of any width, with none at the end; values come again on several of them, with either sign of zero."""
    plain, _ = not_finite(dtype)
    logits = torch.cat((plain, random_logits(30, dtype=dtype).mul(2).round().clamp(-3, 0)))
    wanted = reference.greedy(logits)
    starts = [0, 1, 7, BLOCK + 3, VOCAB, VOCAB]
    for of_keys, tokens, shards in (
        (reference.greedy_keys, reference.tokens_of_keys, logits),
        (sampling.greedy_keys, sampling.tokens_of_keys, logits.to(device)),
    ):
        keys = [of_keys(shards[:, start:end], start) for start, end in pairwise(starts)]
        found = tokens(torch.stack(keys).amax(0))
        assert found.dtype == torch.int32
        assert torch.equal(found.cpu(), wanted)
    ops_keys = ops.greedy_keys(logits.to(device), 5)
    assert torch.equal(ops.tokens_of_keys(ops_keys).cpu(), wanted.where(wanted < 0, wanted + 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite_have_no_token(dtype: torch.dtype, device: torch.device) -> None:
    logits, fine = not_finite(dtype)
    assert [token >= 0 for token in reference.greedy(logits).tolist()] == fine
    assert torch.equal(cpu_sampling.greedy(logits), reference.greedy(logits))
    assert torch.equal(sampling.greedy(logits.to(device)).cpu(), reference.greedy(logits))
    for options in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}):
        found = drawn(logits, [options] * len(fine), points(len(fine)), device)
        assert [token >= 0 for token in found] == fine
        assert found[6] == 0


@pytest.mark.parametrize("candidates", [16384, 8], ids=["room for all candidates", "for few"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_filter_draws_as_the_reference_does(
    dtype: torch.dtype, candidates: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "_CANDIDATES", candidates)
    rows = [{**row, "temperature": (0.7, 1.6)[n % 2]} for n, row in enumerate(FILTERS)]
    drawn(random_logits(len(rows), dtype=dtype), rows, points(len(rows)), device)


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    rows = FILTERS[::5]
    logits, at = random_logits(len(rows), dtype=torch.bfloat16, seed=1), points(len(rows), seed=1)
    alone = [drawn(logits[n : n + 1], [rows[n]], [at[n]], device)[0] for n in range(len(rows))]
    assert drawn(logits, rows, at, device) == alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_as_probable_as_the_last_one_kept_are_kept(dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.full((1, VOCAB), -9.0, dtype=dtype)
    tied = [3, 500, 1024, 1299]
    logits[0, tied] = 1.0
    logits[0, 20] = 2.0
    for options in ({"top_k": 2}, {"top_p": 0.45}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.6}):
        assert drawn(logits.expand(2, -1), [options] * 2, [0.1, 0.9], device) == [tied[0], tied[-1]]


def test_top_p_counts_all_that_top_k_keeps_as_transformers_does(device: torch.device) -> None:
    logits = torch.full((2, VOCAB), -30.0)
    logits[:, [40, 80, 500, 600, 700]] = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.1]).log()
    # three tokens are third, so 1.1 is left: 0.8 of 1.1 need one of them, 0.8 of 0.9 would not
    options = {"top_k": 3, "top_p": 0.8}
    warped = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(3)(None, logits))
    kept = reference.filtered(logits, make_draws([options] * 2, [0.0] * 2)) > 0
    assert torch.equal(kept[:, [40, 80]], warped[:, [40, 80]].isfinite())
    assert kept[:, [500, 600, 700]].all(), "as probable as the one that is needed"
    assert drawn(logits, [options] * 2, [0.1, 0.99], device) == [40, 700]


def test_zeros_of_both_signs_are_equal(device: torch.device) -> None:
    logits = torch.full((4, VOCAB), -9.0, dtype=torch.bfloat16)
    logits[:, [3, 900]] = torch.tensor([-0.0, 0.0], dtype=torch.bfloat16)
    for options in ({"top_k": 1}, {"top_p": 0.2}, {"min_p": 1.0}):
        assert drawn(logits, [options] * 4, [0.1, 0.4, 0.6, 0.9], device) == [3, 3, 900, 900]


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.99}, {"min_p": 0.1}], ids=str)
def test_tokens_without_probability_are_not_drawn_at_the_ends_either(
    options: dict[str, Any], device: torch.device
) -> None:
    logits = torch.full((3, VOCAB), -INF)
    logits[:, [700, 1200]] = 0.0
    assert drawn(logits, [options] * 3, [0.0, 0.5, BELOW_ONE], device) == [700, 1200, 1200]
    logits[:, :] = random_logits(1).bfloat16()
    drawn(logits, [options] * 3, [0.0, 0.5, BELOW_ONE], device)


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_extreme_temperatures(options: dict[str, Any], device: torch.device) -> None:
    logits = random_logits(3, seed=2) * 1000
    rows = [{**options, "temperature": temperature} for temperature in (1e-5, 1e-4, 1e-2)]
    assert drawn(logits, rows, points(3), device) == logits.argmax(-1).tolist()
    logits = torch.zeros(2, VOCAB)
    logits[:, ::2] = -INF
    drawn(logits, [{**options, "temperature": temperature} for temperature in (1e5, 1e300)], points(2), device)


@pytest.mark.parametrize("temperature", [1e5, 1e30, 1e300])
def test_a_huge_temperature_makes_all_tokens_alike(temperature: float, device: torch.device) -> None:
    at = points(5)
    found = drawn(random_logits(5, seed=3), [{"temperature": temperature}] * 5, at, device)
    assert all(abs(token - point * VOCAB) <= 1.1 for token, point in zip(found, at, strict=True))


@pytest.mark.parametrize("options", [{}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_frequencies_are_the_probabilities(options: dict[str, Any], device: torch.device) -> None:
    # points at equal distances: a token's count is its probability times theirs, but for the ends of its interval
    count = 25
    logits, rows = random_logits(1, 12, dtype=torch.bfloat16, seed=4) / 4, [options] * count
    found = drawn(logits.expand(count, -1), rows, [(n + 0.5) / count for n in range(count)], device)
    probs_v = reference.filtered(logits, make_draws(rows[:1], [0.0]))[0]
    counts_v = torch.tensor(found).bincount(minlength=12)
    assert (counts_v - count * probs_v / probs_v.sum()).abs().max() <= 1.001


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_in_something_larger(dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.full((4, VOCAB + 21), NAN, dtype=dtype)
    wide[::2, 5 : VOCAB + 5] = random_logits(2, dtype=dtype, seed=5)
    logits, plain = (where[::2, 5 : VOCAB + 5] for where in (wide.to(device), wide))
    assert torch.equal(sampling.greedy(logits).cpu(), reference.greedy(plain))
    rows, at = [{"top_k": 50, "top_p": 0.9}, {}], points(2)
    found = draw.draw(logits, make_draws(rows, at, device)).cpu()
    assert torch.equal(found, reference.draw(plain, make_draws(rows, at)))


def test_a_vocabulary_of_real_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    logits = random_logits(1, 250_880, dtype=torch.bfloat16, seed=6)
    assert torch.equal(sampling.greedy(logits.to(device)).cpu(), reference.greedy(logits))
    drawn(logits, [{"top_p": 0.9}], [0.6], device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_of_real_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows = [{**row, "temperature": t} for t in (0.5, 1.0) for row in FILTERS] * 8
    logits = random_logits(len(rows), 250_880, dtype=dtype, seed=7)
    assert torch.equal(ops.greedy(logits.cuda()).cpu(), reference.greedy(logits))
    drawn(logits, rows, points(len(rows)), torch.device("cuda"))


def test_draws_know_on_the_host_whether_any_row_has_a_filter() -> None:
    assert not make_draws([{}, {}], [0.0] * 2).filters
    for options in ({"top_k": 1}, {"top_p": 0.5}, {"min_p": 1.0}):
        assert make_draws([{}, options], [0.0] * 2).filters
