"""Memory that the GPUs of one host write for each other."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """A mailbox on each rank's GPU that all ranks can write, for rows of one width in 16-bit types."""

    rank: int
    size: int
    max_rows: int
    """Rows that fit."""
    width: int
    mailbox: Tensor
    """This rank's own, [2, max_rows, ranks, width / 2], int64: two values and the number of the exchange in each."""
    addresses: Tensor
    """[ranks], int64: where each rank's mailbox is, seen from here."""
    exchanges: Tensor
    """[max_rows], int32: exchanges so far of each row, the same on every rank."""
    abort_flag: Tensor
    """[1], int32, written by the host: non-zero once a peer has failed; kernels then stop polling."""
    fixed_order: bool = False
    """Whether sums of any number of rows go through the mailboxes: a row's bits depend on no other."""

    def takes(self, rows: int) -> bool:
        """Whether a sum of `rows` goes through the mailboxes."""
        return self.fixed_order or rows <= self.max_rows


def wrapped(number: int) -> int:
    """The 32-bit integer that a count stands at after `number` steps."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
