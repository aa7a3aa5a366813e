"""The ranks that share a model, and what they do together: identities where there is one rank alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from hasten.ops.partial_sum import PartialSum
from hasten.ops.peers import Peers
from hasten.ops.reference import complete


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share every layer."""

    rank: int = 0
    size: int = 1
    peers: Peers | None = None
    """Where ranks on one host can write each other's memory: for sums of a few rows."""
    expert_parallel: bool = False
    """Whether each rank holds whole experts of a mixture, and not a part of every expert."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduced(self, x_th: Tensor | PartialSum) -> Tensor | PartialSum:
        """The same value as a norm can read it: a sum over ranks is added up, or has mailboxes for its reader."""
        if isinstance(x_th, Tensor) or not x_th.over_ranks:
            return x_th
        if self.peers is not None and x_th.shape[0] <= self.peers.max_rows:
            return replace(x_th, peers=self.peers, over_ranks=False)
        return replace(x_th, parts=self.all_reduce(x_th.product()), added=None, over_ranks=False)

    def complete(self, x_th: Tensor | PartialSum) -> Tensor:
        """The value itself, [t, h], for a reader that is no norm: a sum is added up, with those of all ranks."""
        if isinstance(x_th, Tensor):
            return x_th
        if x_th.over_ranks:
            x_th = replace(x_th, parts=self.all_reduce(x_th.product()), added=None, over_ranks=False)
        return complete(x_th)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's content, in place, on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of one shape, stacked in the order of ranks, on every rank."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def gather(self, shard: Tensor) -> Tensor | None:
        """All ranks' shards [r, v] side by side, [r, ranks * v], on rank 0; None on the others."""
        if self.size == 1:
            return shard
        shard = shard.contiguous()
        shards = [torch.empty_like(shard) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(shard, shards, dst=0)
        return None if shards is None else torch.cat(shards, dim=-1)


_current = TensorGroup()


def tensor_group() -> TensorGroup:
    """The group that layers built now belong to."""
    return _current


@contextmanager
def use_group(group: TensorGroup) -> Iterator[None]:
    """Build layers for `group` inside this context."""
    global _current
    before, _current = _current, group
    try:
        yield
    finally:
        _current = before
