"""Groups of ranks and their collectives, which are identities in a group of one.

No group is a global: whoever builds layers says which ones they belong to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hasten import ops
from hasten.ops.partial_sum import PartialSum
from hasten.ops.peers import Peers
from hasten.parallel.liveness import Liveness
from hasten.parallel.peer_sums import PeerSums
from hasten.parallel.pipeline import StageLink


@dataclass(frozen=True)
class TensorGroup:
    """Ranks that compute the same tokens, each with its shard of the weights."""

    rank: int = 0
    """Of this process, in the group."""
    size: int = 1
    peers: Peers | None = None
    """Where ranks on one host can write each other's memory: for sums of a few rows."""
    sums: PeerSums | None = None
    """Where two ranks read each other's parts of sums of more rows than mailboxes take."""
    first: int = 0
    """The rank in the world of the group's rank 0."""
    handle: dist.ProcessGroup | None = None
    """torch's group; None: that of the world."""
    liveness: Liveness = field(default_factory=Liveness, compare=False, repr=False)
    """What ends a wait for a rank that dies."""
    fixed_order: bool = False
    """Whether sums add the ranks' terms in the order of ranks, whatever the number of rows."""

    def _run(self, collective: Callable[..., dist.Work | None], *arguments: Any, on_gpu: bool, **options: Any) -> None:
        """A collective of torch; a GPU waits for it, and this process does not."""
        work = collective(*arguments, group=self.handle, async_op=not on_gpu, **options)
        if work is not None:
            self.liveness.finish(work)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of the group, in place, the same bits on every rank."""
        if self.size > 1 and self.fixed_order:
            first, *others = self.all_gather(tensor)  # an all-reduce adds in an order by the element's position
            return tensor.copy_(reduce(torch.add, others, first))
        if self.size > 1:
            self._run(dist.all_reduce, tensor, on_gpu=tensor.is_cuda)
        return tensor

    def greatest(self, tensor: Tensor) -> Tensor:
        """The greatest of all ranks' numbers, element by element, in place, on every rank."""
        if self.size > 1:
            self._run(dist.all_reduce, tensor, on_gpu=tensor.is_cuda, op=dist.ReduceOp.MAX)
        return tensor

    def least(self, number: int) -> int:
        """The least of all ranks' numbers, on every rank."""
        smallest = torch.tensor(number)
        if self.size > 1:
            self._run(dist.all_reduce, smallest, on_gpu=False, op=dist.ReduceOp.MIN)
        return int(smallest)

    def reduced(self, x_th: Tensor | PartialSum) -> Tensor | PartialSum:
        """The same value as a norm can read it: a sum over ranks is added up, or has mailboxes for its reader."""
        if isinstance(x_th, Tensor) or not x_th.over_ranks:
            return x_th
        if self.peers is not None and self.peers.takes(x_th.shape[0]):
            return replace(x_th, peers=self.peers, over_ranks=False)
        return replace(x_th, parts=self.all_reduce(x_th.product()), added=None, over_ranks=False)

    def complete(self, x_th: Tensor | PartialSum) -> Tensor:
        """The value itself, [t, h], for a reader that is no norm: a sum is added up, with those of all ranks."""
        if isinstance(x_th, Tensor):
            return x_th
        if x_th.over_ranks:
            x_th = replace(x_th, parts=self.all_reduce(x_th.product()), added=None, over_ranks=False)
        return ops.complete(x_th)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's content, in place, on every rank."""
        if self.size > 1:
            self._run(dist.broadcast, tensor, self.first, on_gpu=tensor.is_cuda)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of one shape, stacked in the order of ranks, on every rank."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        self._run(dist.all_gather, list(gathered.unbind()), tensor.contiguous(), on_gpu=tensor.is_cuda)
        return gathered

    def gather(self, shard: Tensor) -> Tensor | None:
        """All ranks' shards [r, v] side by side, [r, ranks * v], on rank 0; None on the others."""
        if self.size == 1:
            return shard
        shard = shard.contiguous()
        shards = [torch.empty_like(shard) for _ in range(self.size)] if self.rank == 0 else None
        self._run(dist.gather, shard, shards, on_gpu=shard.is_cuda, dst=self.first)
        return None if shards is None else torch.cat(shards, dim=-1)


@dataclass(frozen=True)
class PipelineGroup:
    """Ranks that each hold one stage of the model: some of its layers, which follow each other."""

    stage: int = 0
    """Of this rank: 0 has the embedding, the last one the head."""
    size: int = 1
    """Stages."""
    dealt: tuple[int, ...] = ()
    """Layers of each stage; none: as equal as can be, the first stages having one more where that is left over."""
    link: StageLink | None = None
    """The connections to the other stages, where there are any."""

    @property
    def is_first(self) -> bool:
        """Whether this stage reads token ids."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the head."""
        return self.stage == self.size - 1

    def layers(self, num_layers: int) -> range:
        """Numbers of this stage's layers."""
        least, over = divmod(num_layers, self.size)
        counts = self.dealt or [least + (stage < over) for stage in range(self.size)]
        begin = sum(counts[: self.stage])
        return range(begin, begin + counts[self.stage])


@dataclass(frozen=True)
class ParallelGroups:
    """The groups that a rank belongs to, by what the ranks of each do together."""

    world: TensorGroup = field(default_factory=TensorGroup)
    """All ranks of the engine."""
    tensor: TensorGroup = field(default_factory=TensorGroup)
    """Those that share every layer of this rank."""
    pipeline: PipelineGroup = field(default_factory=PipelineGroup)
    """Those that compute the same tokens one after the other."""
    expert: TensorGroup = field(default_factory=TensorGroup)
    """Those of the tensor group, if each of them holds whole experts of a mixture; else this rank alone."""


ALONE = TensorGroup()
ALL_ALONE = ParallelGroups()
"""What layers and models belong to where nothing else is said."""
