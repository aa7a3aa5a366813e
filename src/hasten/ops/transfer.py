"""Small tensors between host and device, without the host waiting for what the device has still to do."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hasten.ops.plan import Integers

_LINE = 32
"""int32 numbers in 128 bytes: arrays that are sent together each begin at such a line."""


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values. From pinned memory the copy takes its place behind the work that the GPU has already."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def host_buffer(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Undefined int32 numbers on the host, from where a copy to the device does not make the host wait."""
    return torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")


class HostCopy:
    """Tensors on their way to the host, from its making on; those that are there already stay what they are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._tensors = [_start(tensor) for tensor in tensors]
            self._arrived = torch.cuda.Event(enable_timing=True)
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once all of them are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors

    def seconds_after(self, earlier: "HostCopy") -> float | None:
        """Time on the device between the arrivals of two copies that were waited for; None on a CPU."""
        if self._arrived is None or earlier._arrived is None:
            return None
        return earlier._arrived.elapsed_time(self._arrived) / 1000


def _start(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def send(arrays: Mapping[str, Integers], device: torch.device) -> dict[str, Tensor]:
    """Arrays of whole numbers on a device: on a CPU as they are, on others as int32, all in one copy."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    starts = list(accumulate((-(-array.size // _LINE) * _LINE for array in arrays.values()), initial=0))
    host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=True)
    numbers = host.numpy()
    for start, array in zip(starts, arrays.values(), strict=False):
        numbers[start : start + array.size] = array.ravel()
    sent = host.to(device, non_blocking=True)
    return {
        name: sent[start : start + array.size].view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=False)
    }
