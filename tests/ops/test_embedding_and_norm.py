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
    share = torch.full((4, HIDDEN), float("nan"))
    assert not ops.embedding(torch.tensor([0, 3, 8, 12]), share, 4).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 8, 96, 1024])
@pytest.mark.parametrize("rows", [0, 1, 2, 70])
def test_layer_norm(rows: int, hidden: int, dtype: torch.dtype, assert_close: Close) -> None:
    generator = torch.Generator().manual_seed(rows + hidden)
    x = (torch.randn(rows, hidden, generator=generator) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, hidden, generator=generator).to(dtype)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    assert_close("layer_norm", ops.layer_norm(x, weight, bias, 1e-5), expected)
    assert torch.equal(ops.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))


def test_layer_norm_of_a_row_without_variance_is_its_bias() -> None:
    bias = torch.arange(4.0)
    assert torch.equal(ops.layer_norm(torch.full((2, 4), 5.0), torch.ones(4), bias, 1e-5), bias.expand(2, 4))


def test_the_default_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert ops.default_device().type == kind
