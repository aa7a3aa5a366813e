"""Weights that are read to a GPU without torch, by a driver whose GPU is the host's memory."""

import ctypes
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.waiting import LIMIT_S

from hasten.core import gpu_weights
from hasten.core.config import EngineConfig
from hasten.core.gpu_weights import Arrived, Begun, GpuWeights, folder_of


class HostDriver:
    """Memory of the host in the place of a GPU's. `fails`: the name of a call that does."""

    def __init__(self, free: int = 1 << 40, fails: str = "") -> None:
        self.held: dict[int, Any] = {}
        self.freed = 0
        self._free, self._fails = free, fails

    def _allocated(self, name: str, nbytes: int) -> int:
        self._may(name)
        memory = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        self.held[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _may(self, name: str) -> None:
        if name == self._fails:
            raise OSError(f"{name}: CUDA error 2")

    def enter(self) -> None:
        self._may("enter")

    def free_bytes(self) -> int:
        return self._free

    def allocate(self, nbytes: int) -> int:
        return self._allocated("allocate", nbytes)

    def free(self, address: int) -> None:
        del self.held[address]
        self.freed += 1

    def page_locked(self, nbytes: int) -> int:
        return self._allocated("page_locked", nbytes)

    def free_page_locked(self, address: int) -> None:
        del self.held[address]

    def stream(self) -> Any:
        stream = object()
        self.held[id(stream)] = stream
        return stream

    def free_stream(self, stream: Any) -> None:
        del self.held[id(stream)]

    def copy(self, target: int, source: int, nbytes: int, _stream: Any) -> None:
        self._may("copy")
        ctypes.memmove(target, source, nbytes)

    def wait(self, _stream: Any) -> None:
        self._may("wait")


Arrays = dict[str, "np.ndarray[Any, Any]"]


def written(path: Path, arrays: Arrays) -> Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F16", "shape": array.shape, "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values()))
    return path


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Tensors of less than a piece, of some pieces, and empty ones."""
    monkeypatch.setattr(gpu_weights, "_PIECE", 1000)
    monkeypatch.setattr(gpu_weights, "_LARGE", 1500)
    random = np.random.default_rng(0)
    shapes = {"small": (3, 5), "none": (0, 4), "piece": (500,), "large": (70, 33), "last": (1,)}
    return {name: random.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def bytes_of(arrived: Arrived) -> bytes:
    return ctypes.string_at(arrived.address, arrived.nbytes)


def test_tensors_arrive_whole_and_aligned_and_are_freed(tmp_path: Path, arrays: Arrays) -> None:
    driver, interval = HostDriver(), sys.getswitchinterval()
    first = written(tmp_path / "1", arrays)
    second = written(tmp_path / "2", {"large": arrays["large"] * 2})
    weights = GpuWeights([first, second], driver)
    for name, array in arrays.items():
        arrived = weights.take(first, name)
        assert arrived is not None
        assert (bytes_of(arrived), arrived.shape, arrived.dtype) == (array.tobytes(), array.shape, "F16")
        assert arrived.offset % 512 == 0
        assert arrived.__cuda_array_interface__["data"] == (arrived.address, False)
        assert weights.take(first, name) is None, "it is taken once"
    arrived = weights.take(second, "large")
    assert arrived is not None
    assert bytes_of(arrived) == (arrays["large"] * 2).tobytes()
    assert list(driver.held) == [arrived.memory.address]
    del arrived
    assert not driver.held
    weights.end()
    assert sys.getswitchinterval() == interval


def test_a_file_that_was_written_anew_is_not_taken(tmp_path: Path, arrays: Arrays) -> None:
    driver = HostDriver()
    weights = GpuWeights([written(tmp_path / "1", arrays)], driver)
    weights.take(tmp_path / "1", "small")
    written(tmp_path / "1", arrays | {"more": arrays["last"]})
    assert weights.take(tmp_path / "1", "piece") is None
    weights.end()
    assert not driver.held


@pytest.mark.parametrize("fails", ["page_locked", "copy", "wait"])
def test_nothing_is_taken_of_what_failed(fails: str, tmp_path: Path, arrays: Arrays) -> None:
    weights = GpuWeights([written(tmp_path / "1", arrays)], HostDriver(fails=fails))
    assert weights.take(tmp_path / "1", "small") is None
    weights.end()


def test_tensors_are_taken_while_others_are_read(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last copy begins only when tensors of the pieces before those in the two buffers have been taken."""

    class Waiting(HostDriver):
        taken = threading.Event()

        def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
            if nbytes == arrays["last"].nbytes:
                assert self.taken.wait(LIMIT_S)
            super().copy(target, source, nbytes, stream)

    monkeypatch.setattr(gpu_weights, "_READERS", 1)
    driver = Waiting()
    weights = GpuWeights([written(tmp_path / "1", arrays)], driver)
    arrived = weights.take(tmp_path / "1", "piece")
    assert arrived is not None
    assert bytes_of(arrived) == arrays["piece"].tobytes()
    driver.taken.set()
    assert weights.take(tmp_path / "1", "last") is not None
    weights.end()


def test_a_file_that_is_too_short_is_left_to_its_reader(tmp_path: Path, arrays: Arrays) -> None:
    path = written(tmp_path / "1", arrays)
    path.write_bytes(path.read_bytes()[:-3])
    weights = GpuWeights([path], HostDriver())
    assert weights.take(path, "last") is None
    weights.end()


@pytest.mark.parametrize(
    ("content", "driver"),
    [
        (b"", HostDriver()),
        (b"\xff" * 20, HostDriver()),
        ((20).to_bytes(8, "little") + b'{"a": {"dtype": "F"}}', HostDriver()),
        (None, HostDriver(free=100)),
        (None, HostDriver(fails="enter")),
        (None, HostDriver(fails="allocate")),
    ],
    ids=["empty", "no length", "no header", "too large", "no context", "no memory"],
)
def test_what_cannot_be_begun_is_no_error(
    content: bytes | None, driver: HostDriver, tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "model.safetensors", arrays)
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(gpu_weights, "CudaDriver", lambda _number: driver)
    begun = Begun()
    begun.expect()
    begun.begin(tmp_path)
    assert begun.take() is None
    assert not driver.held


def test_what_was_begun_is_taken_once(tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a.safetensors", arrays)
    written(tmp_path / "other.safetensors", arrays)
    index = {"weight_map": dict.fromkeys(arrays, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    driver = HostDriver()
    monkeypatch.setattr(gpu_weights, "CudaDriver", lambda _number: driver)
    begun = Begun()
    assert begun.take() is None
    begun.expect()
    begun.begin(tmp_path)
    weights = begun.take()
    assert weights is not None
    assert begun.take() is None
    assert weights.take(tmp_path / "a.safetensors", "large") is not None
    assert weights.take(tmp_path / "other.safetensors", "large") is None
    weights.end()


@pytest.mark.parametrize(
    ("options", "config", "wanted"),
    [
        ({}, {}, True),
        ({"device": "cuda"}, {}, True),
        ({"device": "cpu"}, {}, False),
        ({"device": "cuda:1"}, {}, False),
        ({"tensor_parallel_size": 2}, {}, False),
        ({"load_format": "dummy"}, {}, False),
        ({}, {"quantization_config": {}}, False),
        ({}, None, False),
    ],
    ids=str,
)
def test_which_engines_need_whole_files(
    options: dict[str, Any], config: dict[str, Any] | None, wanted: bool, tmp_path: Path, arrays: Arrays
) -> None:
    assert folder_of(EngineConfig.create(str(tmp_path), **options)) is None
    written(tmp_path / "model.safetensors", arrays)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert folder_of(EngineConfig.create(str(tmp_path), **options)) == (tmp_path if wanted else None)
