"""Memory of the host from which a GPU copies."""

import weakref

import pytest
import torch
from torch import Tensor

from hasten.ops import transfer


def test_buffers_of_each_size_are_held_together_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    sizes: list[int] = []
    real = torch.empty

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        assert all(each() is not None for each in made)
        tensor = real(size, dtype=dtype)
        made.append(weakref.ref(tensor))
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    transfer.reserve_host_buffers(1000, 3, torch.device("cuda"))
    assert sorted(sizes) == sorted([1 << power for power in range(11)] * 3)
    assert all(each() is None for each in made)
    transfer.reserve_host_buffers(1000, 3, torch.device("cpu"))
    assert len(made) == 33
