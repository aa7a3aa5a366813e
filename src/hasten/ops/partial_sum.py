"""A deferred all-reduce, bias and residual, which the norm that reads them adds up."""

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from hasten.ops.peers import Peers


@dataclass(frozen=True)
class PartialSum:
    """The outputs of one or two linear layers, with what is still to be added to them. It is read once."""

    parts: Tensor
    """[t, h], or [parts, t, h] in fp32: what a product over parts of its input features gave."""
    bias: Tensor | None = None
    """[h]"""
    residual: Tensor | None = None
    """[t, h], or more rows, of which `residual_indices` are the ones to take."""
    residual_indices: Tensor | None = None
    """[t]"""
    peers: Peers | None = None
    """Mailboxes through which the reader adds the other ranks' parts."""
    added: Tensor | None = None
    """Parts of a second product, as `parts`: the other half of a parallel residual, or another rank's part."""
    added_bias: Tensor | None = None
    """[h]"""
    over_ranks: bool = False
    """Whether the other ranks' parts are missing; `TensorGroup.reduced` sees to that before a norm reads the sum."""

    @property
    def num_parts(self) -> int:
        """Parts to add up."""
        return count_parts(self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(t, h)."""
        rows, width = self.parts.shape[-2:]
        return rows, width

    def plus(self, parts: Tensor, bias: Tensor | None) -> "PartialSum":
        """With a second product, which has no residual of its own."""
        assert self.added is None
        return replace(self, added=parts, added_bias=bias)

    def product(self) -> Tensor:
        """All parts of this rank added up, in the widest of their types: [t, h]."""
        whole = _whole(self.parts)
        return whole if self.added is None else whole + _whole(self.added)


def count_parts(parts: Tensor) -> int:
    """Parts of a product that is one whole or several to be added up."""
    return parts.shape[0] if parts.dim() == 3 else 1


def _whole(parts: Tensor) -> Tensor:
    """Parts added up in their order, whatever the number of rows."""
    return parts if parts.dim() == 2 else reduce(torch.add, parts.unbind())
