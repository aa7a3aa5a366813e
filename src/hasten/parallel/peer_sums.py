"""Sums of many rows over the two GPUs of a group, sent while the product that makes them goes on.

A sum of NCCL begins once its product has ended, and nothing hides it. Here a product is computed in pieces of rows. As
soon as one is done, a copy engine writes it into memory of the other GPU, which takes no multiprocessor from the next
piece, and the norm that reads the sum adds what came to what this rank computed. Two slots take turns: a rank sends
again only after it has seen the other's last sum, which that sent behind all that read the slot before.

Shapes: t tokens, h hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from hasten import ops
from hasten.parallel.peer_ring import RingMemory

SLOTS = 2
_MOST_PIECES = 4
_LEAST_PIECE = 1024
"""Rows: a product of fewer takes longer per row, and to launch it as long as it takes."""
_TILE = 128
"""Rows of a product's tile: pieces but the last have a multiple."""


def pieces(rows: int) -> Iterator[slice]:
    """All rows, in as many pieces as a product of them is computed in."""
    count = max(1, min(_MOST_PIECES, rows // _LEAST_PIECE))
    size = -(-rows // (count * _TILE)) * _TILE
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


class PeerSums:
    """What this rank and the other one have sent each other. Both must sum as many rows, in the same order."""

    def __init__(self, own: RingMemory, other: RingMemory, few: int, abort_flag: Tensor) -> None:
        """`few`: rows up to which sums take another way.

        `abort_flag`, int32 [1] in memory of the host, is set once a rank has failed; then nothing waits.
        """
        self._own, self._other = own, other
        self._few = few
        self._abort_flag = abort_flag
        self._number = 0
        self._copies = torch.cuda.Stream(own.slots.device) if own.slots.is_cuda else None

    def takes(self, rows: int, row_bytes: int) -> bool:
        """Whether a sum of this size is sent this way: it fits into a slot, and is not one of few rows.

        None is in a graph, whose replays would all send the number of the sum that was captured.
        """
        if rows <= self._few or rows * row_bytes > self._own.slots.shape[1]:
            return False
        return self._copies is None or not torch.cuda.is_current_stream_capturing()

    def exchanged(self, out_th: Tensor, multiply: Callable[[slice], None]) -> Tensor:
        """The other rank's part of a sum, [t, h], where `multiply(rows)` puts those rows of this rank's into `out_th`.

        It may be read by what follows on the device, until the sum after the next.
        """
        self._number += 1
        theirs_th = self._other.message(self._number, out_th)
        for piece in pieces(len(out_th)):
            multiply(piece)
            with self._beside():
                theirs_th[piece].copy_(out_th[piece], non_blocking=True)
        with self._beside():
            ops.set_count(self._other.arrived, self._number)
        if self._copies is not None:  # `out_th` may be freed once it was read here, and must have been sent by then
            torch.cuda.current_stream(self._copies.device).wait_stream(self._copies)
        ops.await_count(self._own.arrived, self._number, self._abort_flag)
        return self._own.message(self._number, out_th)

    def _beside(self) -> AbstractContextManager[None]:
        """What is launched within goes on beside what this stream computes next, behind what it has computed."""
        return nullcontext() if self._copies is None else _behind_current(self._copies)


@contextmanager
def _behind_current(stream: torch.cuda.Stream) -> Iterator[None]:
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
