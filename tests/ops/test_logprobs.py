"""Shapes: r rows, v vocabulary. The kernels run on a GPU where there is one, and on Triton's interpreter otherwise."""

import pytest
import torch
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.cpu import sampling as cpu_sampling

pytest.importorskip("triton")

from hasten.ops.gpu import logprobs

DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHUNK = 64
"""Logits of one program here."""
INF = float("inf")


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def no_kernels_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU computes with them is compared with the definition in `test_native.py`."""
    monkeypatch.setattr(native, "kernels", lambda: None)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK", CHUNK)


def distinct_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """No two of a row are equal, so that there is only one order."""
    generator = torch.Generator().manual_seed(vocab)
    orders = [torch.randperm(vocab, generator=generator) for _ in range(rows)]
    return ((torch.stack(orders) - vocab // 2) / 16).to(dtype)


def check(logits: Tensor, tokens: list[int], count: int, device: torch.device) -> None:
    tokens_r = torch.tensor(tokens, dtype=torch.int32)
    found = logprobs.top_logprobs(logits.to(device), tokens_r.to(device), count)
    wanted = reference.top_logprobs(logits.double().float(), tokens_r, count)
    assert [part.dtype for part in found] == [part.dtype for part in wanted]
    for fast, expected in zip(cpu_sampling.top_logprobs(logits, tokens_r, count), wanted, strict=True):
        assert torch.equal(fast, expected)
    for part, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(part.cpu(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 200])
@pytest.mark.parametrize("count", [0, 1, 5, 20, 40])
def test_they_are_those_of_the_reference(vocab: int, count: int, dtype: torch.dtype, device: torch.device) -> None:
    check(distinct_logits(3, vocab, dtype), [0, vocab - 1, vocab // 2], count, device)


def test_among_equals_the_first_comes_first(device: torch.device) -> None:
    logits = torch.zeros(2, 3 * CHUNK, device=device)
    logits[1, [5, CHUNK, 2 * CHUNK + 3]] = 1.0
    found = logprobs.top_logprobs(logits, torch.tensor([7, CHUNK], dtype=torch.int32, device=device), 4)
    assert found.ids_rk.tolist() == [[0, 1, 2, 3], [5, CHUNK, 2 * CHUNK + 3, 0]]
    assert found.ranks_r.tolist() == [1, 1]


@pytest.mark.parametrize("vocab", [1, 33, 2 * CHUNK + 5, 300])
@pytest.mark.parametrize("count", [1, 7, 40, 200])
def test_the_greatest_numbers_among_many_equals(vocab: int, count: int, device: torch.device) -> None:
    x = torch.randint(-3, 4, (3, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    x[0] = torch.where(x[0] > 0, x[0] * 0, -INF)
    x[1, ::2] *= -0.0
    for found, wanted in zip(logprobs.largest(x.to(device), count), reference.largest(x, count), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found.cpu(), wanted)
    for fast, wanted in zip(cpu_sampling.largest(x, count), reference.largest(x, count), strict=True):
        assert fast.dtype == wanted.dtype
        assert torch.equal(fast, wanted)


def test_tokens_that_cannot_come_have_no_probability(device: torch.device) -> None:
    logits = torch.full((2, 2 * CHUNK + 3), -INF)
    logits[0, [3, CHUNK + 1]] = torch.tensor([1.0, 2.0])
    logits[1, CHUNK - 1] = 0.0
    check(logits[:, : CHUNK + 2], [3, CHUNK - 1], 1, device)
    found = logprobs.top_logprobs(logits.to(device), torch.tensor([4, 0], dtype=torch.int32, device=device), 1)
    assert found.chosen_r.tolist() == [-INF, -INF]
    assert found.ranks_r.tolist() == [3, 2]


def test_rows_of_a_wider_tensor_and_a_missing_token(device: torch.device) -> None:
    wide = distinct_logits(4, 150, torch.float16)
    check(wide[:, :140], [-1, 3, -1, 139], 3, device)
