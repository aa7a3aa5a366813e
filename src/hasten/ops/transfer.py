"""Small tensors between host and device, without the host waiting for what the device has still to do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.core.gpu_weights import Arrived
from hasten.ops.plan import Integers

_LINE = 32
"""int32 numbers in 128 bytes: arrays that are sent together each begin at such a line."""


def to_device(values: Sequence[Any] | NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values. From pinned memory the copy takes its place behind the work that the GPU has already.

    On a CPU an array of this type stays the tensor's memory.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def host_buffer(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Undefined int32 numbers on the host, from where a copy to the device does not make the host wait."""
    return torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")


class Upload:
    """Copies tensors of the host to a device.

    To a GPU, large ones go through page-locked memory: several threads copy a piece into it while the device fetches
    those before. From a mapped file it would fetch a quarter as fast, since one thread waits for each page.
    """

    _PIECE = 16 << 20
    """Bytes; smaller tensors are copied as they are."""
    _PIECES = 4

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._fetched: list[torch.cuda.Event] = []
        """When the device has what was in each buffer."""
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, there for what its current stream does from now on."""
        is_small = tensor.nbytes < self._PIECE or not tensor.is_contiguous()
        if self.device.type != "cuda" or tensor.device.type != "cpu" or is_small:
            return tensor.to(self.device)
        copy = torch.empty_like(tensor, device=self.device)
        source, target = (each.reshape(-1).view(torch.uint8) for each in (tensor, copy))
        for start in range(0, len(source), self._PIECE):
            piece = slice(start, start + self._PIECE)
            self._fetch(source[piece], target[piece])
        return copy

    def _fetch(self, source: Tensor, target: Tensor) -> None:
        if len(self._buffers) < self._PIECES:
            self._buffers.append(torch.empty(self._PIECE, dtype=torch.uint8, pin_memory=True))
            self._fetched.append(torch.cuda.Event())
        turn, self._turn = self._turn, (self._turn + 1) % self._PIECES
        self._fetched[turn].synchronize()
        buffer = self._buffers[turn][: len(source)]
        target.copy_(buffer.copy_(source), non_blocking=True)
        self._fetched[turn].record()


_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, as safetensors calls them."""


def arrived_tensor(arrived: Arrived, device: torch.device) -> Tensor | None:
    """A tensor over memory of a GPU that holds it; None where its type is none of a weight in full precision."""
    dtype = _STORED.get(arrived.dtype)
    if dtype is None or arrived.nbytes == 0:
        return None
    whole: Tensor = torch.as_tensor(arrived, device=device)
    return whole.view(dtype).view(arrived.shape)


class HostCopy:
    """Tensors on their way to the host, from its making on; those that are there already stay what they are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._arrived: torch.cuda.Event | None = None
        self._arrays: list[NDArray[Any]] | None = None
        if tensors[0].is_cuda:
            self._tensors = [_start(tensor) for tensor in tensors]
            self._arrived = torch.cuda.Event(enable_timing=True)
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    @property
    def is_under_way(self) -> bool:
        """Whether the tensors were not on the host when the copy began."""
        return self._arrived is not None

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once all of them are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors

    def arrays(self) -> list[NDArray[Any]]:
        """The tensors on the host as arrays, once all of them are there."""
        if self._arrays is None:
            self._arrays = [tensor.numpy() for tensor in self.wait()]
        return self._arrays

    def seconds_after(self, earlier: "HostCopy") -> float | None:
        """Time on the device between the arrivals of two copies that were waited for; None on a CPU."""
        if self._arrived is None or earlier._arrived is None:
            return None
        return earlier._arrived.elapsed_time(self._arrived) / 1000


def _start(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class Sections:
    """Arrays of whole numbers in one int32 tensor, so that one copy brings them to a device."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of each array, or the largest that it may have. Each begins at a line, in this order."""

    @cached_property
    def _sections(self) -> dict[str, slice]:
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        starts = accumulate((-(-size // _LINE) * _LINE for size in sizes.values()), initial=0)
        return {name: slice(start, start + size) for (name, size), start in zip(sizes.items(), starts, strict=False)}

    @property
    def total(self) -> int:
        """Numbers of a tensor that holds all of them."""
        return max((section.stop for section in self._sections.values()), default=0)

    def hold(self, arrays: Mapping[str, Integers]) -> bool:
        """Whether there is room for each of these arrays."""
        return all(
            name in self.shapes and all(has <= most for has, most in zip(array.shape, self.shapes[name], strict=True))
            for name, array in arrays.items()
        )

    def packed(self, arrays: Mapping[str, Integers], device: torch.device) -> Tensor:
        """The arrays on the host, for a copy to `device`; zeros where there are none.

        What lies behind the last array is left out. Arrays may be shorter than their sections along the first axis.
        """
        starts = {name: self._sections[name].start for name in arrays}
        host = host_buffer((max(starts[name] + array.size for name, array in arrays.items()),), device)
        numbers = host.numpy()
        numbers.fill(0)
        for name, array in arrays.items():
            numbers[starts[name] : starts[name] + array.size] = array.ravel()
        return host

    def views(self, whole: Tensor) -> dict[str, Tensor]:
        """The sections of a tensor of `total` numbers."""
        return {name: whole[section].view(self.shapes[name]) for name, section in self._sections.items()}


def send(arrays: Mapping[str, Integers], device: torch.device) -> dict[str, Tensor]:
    """Arrays of whole numbers on a device: on a CPU as they are, on others as int32, all in one copy."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sections = Sections({name: array.shape for name, array in arrays.items()})
    return sections.views(sections.packed(arrays, device).to(device, non_blocking=True))
