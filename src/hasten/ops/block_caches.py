"""The key/value caches of all layers as one object, so that their blocks are copied together."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockCaches:
    """Caches [blocks, ...] that are addressed by the same block numbers."""

    tensors: tuple[Tensor, ...]
    """Contiguous, all on one device."""
    addresses: tuple[tuple[int, Tensor], ...]
    """For each size of a block in bytes, where the caches with such blocks begin: int64 on their device."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "BlockCaches":
        """These caches; none of them may be moved or replaced afterwards."""
        by_size: dict[int, list[int]] = defaultdict(list)
        for tensor in tensors:
            assert tensor.is_contiguous()
            by_size[tensor[0].nbytes].append(tensor.data_ptr())
        addresses = ((size, torch.tensor(starts, device=tensors[0].device)) for size, starts in by_size.items())
        return cls(tuple(tensors), tuple(addresses))
