"""Counts that one GPU waits for and another one sets; here one device does both."""

import pytest
import torch

from hasten.ops import reference
from hasten.ops.gpu import signals

LARGEST = (1 << 31) - 1


@pytest.mark.parametrize(("stands", "awaited"), [(3, 3), (7, 3), (-5, LARGEST), (LARGEST + 2, LARGEST - 1)], ids=str)
def test_what_was_set_is_not_waited_for(stands: int, awaited: int, device: torch.device) -> None:
    count, nothing = torch.zeros(2, 1, dtype=torch.int32, device=device)
    expected = torch.zeros(1, dtype=torch.int32)
    signals.set_count(count, stands)
    reference.set_count(expected, stands)
    assert count.tolist() == expected.tolist()
    for op in (signals.await_count, reference.await_count):
        op(count, awaited, nothing)  # and comes back


@pytest.mark.parametrize(("stands", "awaited"), [(2, 3), (LARGEST, LARGEST + 1)], ids=str)
def test_a_failure_ends_a_wait(stands: int, awaited: int, device: torch.device) -> None:
    count = torch.full((1,), stands, dtype=torch.int32, device=device)
    failed = torch.ones(1, dtype=torch.int32, device=device)
    for op in (signals.await_count, reference.await_count):
        op(count, awaited, failed)
    assert count.item() == stands
