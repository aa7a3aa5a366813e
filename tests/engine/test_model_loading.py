"""Weights that come to a GPU directly, by a driver whose GPU is the host's memory."""

import ctypes
from pathlib import Path

import pytest
import torch
from tests.core.test_gpu_weights import HostDriver
from torch import Tensor

from hasten import ops
from hasten.checkpoint.plan import open_checkpoint
from hasten.checkpoint.source import Source
from hasten.core import gpu_weights
from hasten.core.gpu_weights import Arrived, Begun
from hasten.engine import model_loading
from hasten.parallel.groups import ALONE, ParallelGroups, TensorGroup

GROUPS = ParallelGroups(world=ALONE, tensor=ALONE)


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[int, HostDriver]:
    """The drivers that were asked for, by the number of their GPU."""
    found: dict[int, HostDriver] = {}
    monkeypatch.setattr(gpu_weights, "CudaDriver", lambda number: found.setdefault(number, HostDriver()))

    def tensor(arrived: Arrived, _device: torch.device) -> Tensor:
        assert arrived.dtype == "F32"
        data = ctypes.string_at(arrived.address, arrived.nbytes)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(arrived.shape)

    monkeypatch.setattr(ops, "arrived_tensor", tensor)
    return found


def weights_of(source: Source) -> list[Tensor]:
    return [source.shard(spec, 0, 1) for spec in source.specs]


def require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_engine_alone_reads_whole_files_to_its_gpu(
    tiny_bloom: Path, drivers: dict[int, HostDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(str(tiny_bloom)).source
    expected = [each.clone() for each in weights_of(source)]
    with model_loading._arriving(source, GROUPS, torch.device("cuda", 1)):
        assert list(drivers) == [1]
        monkeypatch.setattr(source, "_stored", None)  # the files' own reader is not needed
        require_same(weights_of(source), expected)
    monkeypatch.undo()
    assert not drivers[1].held
    require_same(weights_of(source), expected)


@pytest.mark.parametrize("number", [0, 1])
def test_what_was_begun_is_taken_by_the_first_gpu_alone(
    number: int, tiny_bloom: Path, drivers: dict[int, HostDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(str(tiny_bloom)).source
    expected = [each.clone() for each in weights_of(source)]
    begun = Begun()
    begun.expect()
    begun.begin(tiny_bloom)
    monkeypatch.setattr(model_loading, "BEGUN", begun)
    before = source.arrived
    with model_loading._arriving(source, GROUPS, torch.device("cuda", number)):
        assert list(drivers) == [0]
        assert (source.arrived is before) == (number == 1)
        require_same(weights_of(source), expected)
    assert source.arrived is before
    assert not drivers[0].held


def test_what_did_not_arrive_comes_from_the_files(
    tiny_bloom: Path, drivers: dict[int, HostDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(str(tiny_bloom)).source
    expected = [each.clone() for each in weights_of(source)]
    monkeypatch.setattr(HostDriver, "copy", _failing)
    with model_loading._arriving(source, GROUPS, torch.device("cuda", 0)):
        require_same(weights_of(source), expected)
    assert not drivers[0].held


def _failing(*_: object) -> None:
    raise OSError("cuMemcpyHtoDAsync_v2: CUDA error 700")


def test_others_read_no_files_directly(tiny_bloom: Path, drivers: dict[int, HostDriver]) -> None:
    source = open_checkpoint(str(tiny_bloom)).source
    two = TensorGroup(0, 2)
    for groups, device in (
        (GROUPS, torch.device("cpu")),
        (ParallelGroups(world=two, tensor=two), torch.device("cuda", 0)),
    ):
        with model_loading._arriving(source, groups, device):
            assert not drivers
