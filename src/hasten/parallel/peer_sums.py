"""Sums of many rows over the two GPUs of a group: each reads the other's part where that was computed.

NCCL adds a sum up, and the norm behind it reads what NCCL wrote. Here a product is written where the other GPU can read
it, and the norm reads both parts, one of them over the link between the GPUs: as many bytes cross it, in the time that
they take, and nothing else is to be done. Two slots take turns: a rank writes a slot again after it has seen that the
other has the next sum, which that has behind all that read the slot.

Shapes: t tokens, h hidden.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten import ops
from hasten.parallel.peer_ring import RingMemory

if TYPE_CHECKING:
    from hasten.parallel.groups import TensorGroup

SLOTS = 2
_COMPARED_BYTES = 1 << 20
"""Of each slot, at a start."""


class PeerSums:
    """What this rank and the other one have summed. Both must sum as many rows, in the same order.

    What reads a sum must be launched before the next sum is.
    """

    def __init__(self, own: RingMemory, other: RingMemory, few: int, abort_flag: Tensor) -> None:
        """`few`: rows up to which sums take another way.

        `abort_flag`, int32 [1] in memory of the host, is set once a rank has failed; then nothing waits.
        """
        self._own, self._other = own, other
        self._few = few
        self._abort_flag = abort_flag
        self._number = 0

    def takes(self, rows: int, row_bytes: int) -> bool:
        """Whether a sum of this size is computed this way: it fits into a slot, and is not one of few rows.

        None is in a graph, whose replays would all have the number of the sum that was captured.
        """
        slots = self._own.slots
        if rows <= self._few or rows * row_bytes > slots.shape[1]:
            return False
        return not (slots.is_cuda and torch.cuda.is_current_stream_capturing())

    def exchanged(
        self, rows: int, width: int, dtype: torch.dtype, multiply: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of a sum and the other's, both [t, h], where `multiply` writes this rank's.

        They may be read by what follows on the device, until the sum after the next.
        """
        self._number += 1
        own_th, other_th = (each.part(self._number, rows, width, dtype) for each in (self._own, self._other))
        multiply(own_th)
        ops.set_count(self._other.arrived, self._number)
        ops.await_count(self._own.arrived, self._number, self._abort_flag)
        return own_th, other_th

    def reads_right(self, group: "TensorGroup") -> bool:
        """Whether this rank reads what the other one writes, in every slot twice. Every rank must call it.

        Without a kernel of hasten's: a start compiles them together as long as none has been launched.
        """
        slots, right = self._own.slots, True
        nbytes = min(slots.shape[1], _COMPARED_BYTES)

        def pattern(number: int, rank: int) -> Tensor:
            return (torch.arange(nbytes, device=slots.device) * (2 * number + 3) + rank).to(torch.uint8)

        for number in range(2 * len(slots)):
            self._own.part(number, 1, nbytes, torch.uint8).copy_(pattern(number, group.rank))
            if slots.is_cuda:
                torch.cuda.synchronize(slots.device)
            group.least(number)  # both have written
            read = self._other.part(number, 1, nbytes, torch.uint8)
            right = bool((read == pattern(number, 1 - group.rank)).all()) and right
            group.least(number)  # both have read
        return right
