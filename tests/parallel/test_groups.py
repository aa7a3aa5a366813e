"""Sums over ranks that a norm completes. Shapes: t tokens, h hidden."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hasten.ops import reference
from hasten.ops.partial_sum import PartialSum
from hasten.ops.peers import Peers
from hasten.parallel.groups import TensorGroup

ROWS, WIDTH, MOST_ROWS = 3, 4, 5


@dataclass(frozen=True)
class Doubling(TensorGroup):
    """One of two ranks that bring the same."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        assert tensor.dim() == 2
        return tensor * 2


def mailboxes() -> Peers:
    mailbox = torch.zeros(2, MOST_ROWS, 2, WIDTH // 2, dtype=torch.int64)
    addresses, exchanges = torch.zeros(2, dtype=torch.int64), torch.zeros(MOST_ROWS, dtype=torch.int32)
    return Peers(0, 2, MOST_ROWS, WIDTH, mailbox, addresses, exchanges, abort_flag=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("parts", [None, 1, 3])
def test_parts_are_added_up_before_ranks_are_and_all_else_after(parts: int | None) -> None:
    result = torch.randn(ROWS, WIDTH) if parts is None else torch.randn(parts, ROWS, WIDTH)
    bias, residual, rows = torch.randn(WIDTH), torch.randn(ROWS + 2, WIDTH), torch.tensor([4, 0, 1])
    open_sum = PartialSum(result.clone(), bias, residual, rows, over_ranks=True)
    whole = result if parts is None else result.sum(0)
    sum_ = Doubling(0, 2).reduced(open_sum)
    assert isinstance(sum_, PartialSum)
    torch.testing.assert_close(sum_.parts, 2 * whole)
    assert sum_.bias is bias
    assert sum_.residual is residual
    assert sum_.residual_indices is rows
    assert sum_.peers is None
    more, more_bias = torch.randn(2, ROWS, WIDTH), torch.randn(WIDTH)
    both = Doubling(0, 2).reduced(open_sum.plus(more, more_bias))  # one all-reduce for both
    assert isinstance(both, PartialSum)
    torch.testing.assert_close(both.parts, 2 * (whole + more.sum(0)))
    assert both.added is None
    torch.testing.assert_close(reference.complete(both), 2 * (whole + more.sum(0)) + bias + more_bias + residual[rows])


@dataclass(frozen=True)
class Gathering(TensorGroup):
    """One of three ranks, whose terms come to something else in another order."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.ones_like(tensor), -tensor])


def test_in_a_fixed_order_terms_are_added_in_the_order_of_ranks() -> None:
    term = torch.full((ROWS, WIDTH), 1e8)
    peers = replace(mailboxes(), fixed_order=True)
    summed = Gathering(0, 3, fixed_order=True).all_reduce(term)
    assert summed is term
    assert not summed.any(), "1e8 + 1 - 1e8 in fp32"
    many = PartialSum(torch.randn(10 * MOST_ROWS, WIDTH), over_ranks=True)
    by_mail = Gathering(0, 2, peers, fixed_order=True).reduced(many)  # whatever the number of rows
    assert isinstance(by_mail, PartialSum)
    assert by_mail.peers is peers


def test_what_is_whole_is_left_as_it_is() -> None:
    x_th = torch.randn(ROWS, WIDTH)
    whole = PartialSum(x_th, residual=x_th)
    for value in (x_th, whole):
        assert Doubling(0, 2, mailboxes()).reduced(value) is value


@pytest.mark.parametrize(("rows", "by_mail"), [(1, True), (MOST_ROWS, True), (MOST_ROWS + 1, False)])
@pytest.mark.parametrize("parts", [None, 2])
def test_as_many_rows_as_fit_go_through_mailboxes(parts: int | None, rows: int, by_mail: bool) -> None:
    peers = mailboxes()
    result = torch.randn(rows, WIDTH) if parts is None else torch.randn(parts, rows, WIDTH)
    more = torch.randn(rows, WIDTH)
    sum_ = Doubling(0, 2, peers).reduced(PartialSum(result, over_ranks=True).plus(more, None))
    assert isinstance(sum_, PartialSum)
    assert not sum_.over_ranks
    if by_mail:  # this rank's own parts, as they are: the norm brings the others'
        assert sum_.parts is result
        assert sum_.added is more
        assert sum_.peers is peers
    else:
        torch.testing.assert_close(sum_.parts, 2 * ((result if parts is None else result.sum(0)) + more))
        assert sum_.peers is None
