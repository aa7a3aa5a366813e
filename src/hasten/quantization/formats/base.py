"""The interface of a format of quantized checkpoints, and checks of its tensors.

Shapes: o output features, h input features, g groups of input features.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hasten.core.errors import CheckpointError
from hasten.quantization.stored import StoredWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Module:
    """A quantized linear layer of a checkpoint, or the weights of all experts of a layer."""

    name: str
    """As its file has it, with the model's prefix."""
    shape: tuple[int, ...]
    """(o, h), or that of a stacked weight of experts, as a full-precision file would have it."""
    tensors: Mapping[str, Tensor]
    """By what they are called behind the module's name."""
    separator: str = "."
    """What stands between both."""

    def fail(self, kind: str, what: str) -> CheckpointError:
        """An error that names one of its tensors."""
        return CheckpointError(f"tensor '{self.name}{self.separator}{kind}' {what}")

    def tensor(self, kind: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], key: str) -> Tensor:
        """One of its tensors; CheckpointError where shape or type is another than `key` of the configuration asks."""
        tensor = self.tensors[kind]
        if tuple(tensor.shape) != tuple(shape):
            raise self.fail(kind, f"has shape {tuple(tensor.shape)}, but {key} asks for {tuple(shape)}")
        if tensor.dtype not in dtypes:
            raise self.fail(kind, f"has type {tensor.dtype}, but {key} asks for {' or '.join(map(str, dtypes))}")
        return tensor

    def scales(self, kind: str, shape: Sequence[int], key: str) -> Tensor:
        """Scales; CheckpointError where one is not finite."""
        tensor = self.tensor(kind, shape, FLOATS, key)
        if not bool(tensor.isfinite().all()):
            raise self.fail(kind, "has NaN or infinity: the checkpoint is damaged; copy it again")
        return tensor


class Format(Protocol):
    """A way in which checkpoints hold quantized weights, as one checkpoint's configuration describes it."""

    @property
    def name(self) -> str:
        """As messages call it."""
        ...

    @property
    def is_held(self) -> bool:
        """Whether models hold weights as the files do; else all of them are in full precision in memory."""
        ...

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """Type of 8 bits that stored scales of the key/value cache are for; None where there are none.

        UnsupportedError names the key of the configuration that asks for another kind of cache.
        """
        ...

    def find(self, module: str, names: Container[str]) -> Mapping[str, str] | None:
        """Stored names of a module's tensors by what they are, among `names`; None for one that is not quantized.

        A weight that is not called `weight` is a module of its own. CheckpointError names a tensor that is missing.
        """
        ...

    def is_leftover(self, name: str) -> bool:
        """Whether a tensor that belongs to no weight may be ignored."""
        ...

    def read(self, module: Module) -> StoredWeight | Tensor:
        """A module's weight, or a tensor where nothing computes on it as it is stored.

        CheckpointError names the tensor and the key of the configuration that differ.
        """
        ...


def find(
    module: str,
    names: Container[str],
    required: Sequence[str],
    optional: Sequence[str],
    format_name: str,
    *,
    separator: str = ".",
) -> Mapping[str, str] | None:
    """`Format.find` where a module that has any of the required tensors is quantized; a plain one has its `weight`."""
    of_module = {kind: f"{module}{separator}{kind}" for kind in (*required, *optional)}
    present = {kind: name for kind, name in of_module.items() if name in names}
    if not any(kind in present for kind in required if kind != "weight"):
        return None
    if missing := [kind for kind in required if kind not in present]:
        raise CheckpointError(
            f"lacks tensor '{of_module[missing[0]]}', which {format_name} keeps with "
            f"'{next(iter(present.values()))}'; the checkpoint is incomplete: copy it again"
        )
    return present


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Values of 4 or 8 bits in words of 32, the lowest bits first: int32 [...] as uint8 [..., 32 / bits]."""
    # flat: the strides of a single column are arbitrary, and a view as bytes needs one of 1
    octets = words.flatten().view(torch.uint8).unflatten(0, (*words.shape, 4))
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def groups_of(in_features: int, group_size: int | None) -> Tensor:
    """The groups of consecutive input features [h]; without a size there is one."""
    return torch.arange(in_features) // (group_size or in_features)
