from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.ops import reference

Close = Callable[[str, Tensor, Tensor], None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCAB, HIDDEN = 13, 6
IDS = torch.tensor([0, 12, 5, 5, 6, 7, 3, 4])


def table(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_ids(dtype: torch.dtype) -> None:
    weight = table(dtype)
    expected = torch.stack([weight[int(token)] for token in IDS])
    assert torch.equal(ops.embedding(IDS, weight), expected)
    assert torch.equal(ops.embedding(IDS, weight, 0), expected)
    assert torch.equal(reference.embedding(IDS, weight, None), expected)
    assert ops.embedding(IDS[:0], weight).shape == (0, HIDDEN)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
def test_shares_of_the_vocabulary_add_up_to_the_whole(size: int) -> None:
    rows = -(-VOCAB // size)
    padded = torch.cat([table(), torch.zeros(rows * size - VOCAB, HIDDEN)])
    shares = [ops.embedding(IDS, padded[rank * rows : (rank + 1) * rows], rank * rows) for rank in range(size)]
    assert torch.equal(torch.stack(shares).sum(0), ops.embedding(IDS, table()))
    # every token is held by one rank, and the others give exact zeros
    assert torch.stack(shares).any(-1).sum(0).tolist() == [1] * len(IDS)


def test_a_rank_that_holds_none_of_the_ids_gives_zeros_whatever_its_rows_are() -> None:
    shard = torch.full((4, HIDDEN), float("nan"))
    assert not ops.embedding(torch.tensor([0, 3, 8, 12]), shard, 4).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 8, 96, 1024])
@pytest.mark.parametrize("rows", [0, 1, 2, 70])
def test_layer_norm(rows: int, hidden: int, dtype: torch.dtype, assert_close: Close) -> None:
    generator = torch.Generator().manual_seed(rows + hidden)
    x = (torch.randn(rows, hidden, generator=generator) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, hidden, generator=generator).to(dtype)
    for op in (ops.norm, reference.norm):
        normed, settled = op(x, weight, bias, 1e-5)
        assert normed.dtype == dtype
        assert_close("layer_norm", normed, exact_norm(x, weight, bias))
        assert settled is x  # there is nothing to add up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 8, 96, 1024])
def test_rms_norm_and_norms_without_bias(hidden: int, dtype: torch.dtype, assert_close: Close) -> None:
    generator = torch.Generator().manual_seed(hidden)
    x = (torch.randn(5, hidden, generator=generator) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, hidden, generator=generator).to(dtype)
    scaled = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    for op in (ops.norm, reference.norm):
        assert_close("layer_norm", op(x, weight, None, 1e-5, rms=True)[0], scaled)
        assert_close("layer_norm", op(x, weight, bias, 1e-5, rms=True)[0], scaled + bias.double())
        more = scaled / weight.double() * (weight.double() + 1)
        assert_close("layer_norm", op(x, weight, None, 1e-5, rms=True, unit_offset=True)[0], more)
        assert_close("layer_norm", op(x, weight, None, 1e-5)[0], exact_norm(x, weight, torch.zeros(hidden)))
        both, twice = op(ops.PartialSum(x, residual=x).plus(x, bias), weight, None, 1e-5, rms=True)
        assert_close("stepwise", twice, 3 * x.double() + bias.double())
        assert_close("layer_norm", both, op(twice, weight, None, 1e-5, rms=True)[0].double())
        of_sum, total = op(ops.PartialSum(x, residual=x), weight, None, 1e-5, rms=True)
        assert torch.equal(total, x + x)
        assert_close("layer_norm", of_sum, op(total, weight, None, 1e-5, rms=True)[0].double())


def exact_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition in fp64."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()


def test_layer_norm_of_a_row_without_variance_is_its_bias() -> None:
    bias = torch.arange(4.0)
    x = torch.full((2, 4), 5.0)
    for of in (x, ops.PartialSum(x), ops.PartialSum(torch.full((3, 2, 4), 2.5), residual=-x / 2)):
        assert torch.equal(ops.norm(of, torch.ones(4), bias, 1e-5)[0], bias.expand(2, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [None, 1, 3], ids=["whole", "one part", "three parts"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("residual", [None, "all rows", "some rows"])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_layer_norm_of_a_sum(
    rows: int, residual: str | None, bias: bool, parts: int | None, dtype: torch.dtype, assert_close: Close
) -> None:
    hidden, generator = 40, torch.Generator().manual_seed(rows)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    sum_ = ops.PartialSum(
        draw(rows, hidden) if parts is None else draw(parts, rows, hidden, dtype=torch.float32),
        draw(hidden) if bias else None,
        None if residual is None else draw(rows + 5 * (residual == "some rows"), hidden) * 3,
        torch.randperm(rows + 5, generator=generator)[:rows] if residual == "some rows" else None,
    )
    weight, norm_bias = draw(hidden), draw(hidden)
    assert sum_.shape == (rows, hidden)
    assert sum_.num_parts == (parts or 1)
    total = sum_.parts.double() if parts is None else sum_.parts.double().sum(0)
    if sum_.bias is not None:
        total = total + sum_.bias.double()
    for row in range(rows):
        if sum_.residual is not None:
            total[row] += sum_.residual[
                row if sum_.residual_indices is None else int(sum_.residual_indices[row])
            ].double()
    given = [tensor for tensor in (sum_.parts, sum_.bias, sum_.residual, sum_.residual_indices) if tensor is not None]
    before = [tensor.clone() for tensor in given]
    for op in (ops.norm, reference.norm):
        normed, settled = op(sum_, weight, norm_bias, 1e-5)
        assert normed.dtype == settled.dtype == dtype
        # parts in fp32 are added up in fp32 and rounded once; a whole in a half type, after every step
        assert_close("stepwise" if parts is None else "linear", settled, total)
        assert_close("layer_norm", normed, exact_norm(settled, weight, norm_bias))
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_and_norm_at_once(dtype: torch.dtype, assert_close: Close) -> None:
    weight_vh = table(dtype)
    vectors = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = exact_norm(torch.stack([weight_vh[int(token)] for token in IDS]), *vectors)
    hidden = ops.hidden_dtype(dtype, "cpu")
    for op, type_ in ((ops.embedding_norm, hidden), (reference.embedding_norm, dtype)):
        weight, bias = vectors.to(type_)
        found = op(IDS, weight_vh, weight, bias, 1e-5)
        assert found.dtype == type_
        assert_close("layer_norm", found, expected)
        assert op(IDS[:0], weight_vh, weight, bias, 1e-5).shape == (0, HIDDEN)


def test_the_default_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert ops.default_device().type == kind
