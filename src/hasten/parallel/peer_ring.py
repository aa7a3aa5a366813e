"""Messages round a ring of ranks, each written by its sender into memory of the receiver's GPU.

A rank has room for a few messages of the rank before. The sender copies a message there and counts it; the receiver
waits for the count, copies the message out of there and counts it as taken, in memory of the sender, which waits for
that before it writes to the same slot. All of it is launched behind what the sender computed and before what the
receiver computes, so no kernel stands on a GPU waiting while there is something to compute, as NCCL's would on both.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hasten import ops
from hasten.parallel.pipeline import Wait

_COUNT_BYTES = 128
"""Of a count that one other rank writes: a cache line."""


@dataclass(frozen=True)
class RingMemory:
    """What one rank's GPU holds for its neighbours in the ring."""

    slots: Tensor
    """[s, bytes], uint8: messages of the rank before."""
    arrived: Tensor
    """int32 [1]: messages that the rank before has written."""
    taken: Tensor
    """int32 [1]: messages of this rank that the rank behind has taken."""

    @staticmethod
    def nbytes(slots: int, slot_bytes: int) -> int:
        """Bytes of this number of slots."""
        return 2 * _COUNT_BYTES + slots * _aligned(slot_bytes)

    @classmethod
    def of(cls, memory: Tensor, slots: int) -> "RingMemory":
        """A view of `nbytes` bytes, uint8."""
        arrived, taken, messages = memory.split([_COUNT_BYTES, _COUNT_BYTES, len(memory) - 2 * _COUNT_BYTES])
        return cls(messages.view(slots, -1), arrived.view(torch.int32)[:1], taken.view(torch.int32)[:1])

    def message(self, number: int, like: Tensor) -> Tensor:
        """The slot of a message with the type and the shape of `like`."""
        return self._slot(number, like.nbytes).view(like.dtype).view(like.shape)

    def part(self, number: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The slot of a message as [rows, width] of a type."""
        return self._slot(number, rows * width * dtype.itemsize).view(dtype).view(rows, width)

    def _slot(self, number: int, nbytes: int) -> Tensor:
        slot = self.slots[number % len(self.slots)]
        assert nbytes <= len(slot)
        return slot[:nbytes]


class PeerRing:
    """A rank's connections to the rank behind and from the rank before."""

    def __init__(self, own: RingMemory, before: RingMemory, behind: RingMemory, abort_flag: Tensor) -> None:
        """`abort_flag`, int32 [1] in memory of the host, is set once a rank has failed; then nothing waits."""
        self._own, self._before, self._behind = own, before, behind
        self._abort_flag = abort_flag
        self._sent = self._expected = 0

    def send(self, tensor: Tensor) -> None:
        """See `hasten.parallel.pipeline.Outbound`."""
        self._sent += 1
        slots = len(self._own.slots)
        if self._sent > slots:
            ops.await_count(self._own.taken, self._sent - slots, self._abort_flag)
        self._behind.message(self._sent, tensor).copy_(tensor)
        ops.set_count(self._behind.arrived, self._sent)

    def receive(self, tensor: Tensor) -> Wait:
        """See `hasten.parallel.pipeline.Inbound`."""
        self._expected += 1
        return partial(self._take, tensor, self._expected)

    def _take(self, tensor: Tensor, number: int) -> None:
        ops.await_count(self._own.arrived, number, self._abort_flag)
        tensor.copy_(self._own.message(number, tensor))
        ops.set_count(self._before.taken, number)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _COUNT_BYTES) * _COUNT_BYTES
