"""Token ids, counts and blocks that stay on the device."""

import time

import torch
from torch import Tensor

from hasten.ops.block_caches import BlockCaches
from hasten.ops.peers import wrapped

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Integer types by their size in bytes, which hold the bits of other types of that size."""
_POLL_S = 1e-4
"""Between two looks at a count that another thread writes."""


def resolve_ids(ids_t: Tensor, chosen_r: Tensor) -> Tensor:  # noqa: D103
    chosen_t = chosen_r[(-1 - ids_t).clamp_(min=0)].clamp(min=0)
    return chosen_t.to(ids_t.dtype).where(ids_t < 0, ids_t)


def await_count(count: Tensor, number: int, abort_flag: Tensor) -> None:  # noqa: D103
    while wrapped(number - int(count)) > 0 and not int(abort_flag):
        time.sleep(_POLL_S)


def set_count(count: Tensor, number: int) -> None:  # noqa: D103
    count.fill_(wrapped(number))


def copy_blocks(caches: BlockCaches, sources_n: Tensor, targets_n: Tensor) -> None:  # noqa: D103
    for cache in caches.tensors:
        bits = cache.view(_BITS[cache.itemsize])  # copied as 16-bit floats, NaN loses its bits on a GPU
        bits.index_copy_(0, targets_n, bits.index_select(0, sources_n))
