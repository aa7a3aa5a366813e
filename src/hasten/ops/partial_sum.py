"""A deferred all-reduce, bias and residual, which the norm that reads them adds up."""

from dataclasses import dataclass

from torch import Tensor

from hasten.ops.peers import Peers


@dataclass(frozen=True)
class PartialSum:
    """The output of a linear layer, with what is still to be added to it."""

    parts: Tensor
    """[t, h], or [parts, t, h] in fp32: what a product over parts of its input features gave."""
    bias: Tensor | None = None
    """[h]"""
    residual: Tensor | None = None
    """[t, h], or more rows, of which `residual_indices` are the ones to take."""
    residual_indices: Tensor | None = None
    """[t]"""
    peers: Peers | None = None
    """Where the parts of other ranks come from, if they are to be added too."""

    @property
    def num_parts(self) -> int:
        """Parts to add up."""
        return self.parts.shape[0] if self.parts.dim() == 3 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """(t, h)."""
        rows, width = self.parts.shape[-2:]
        return rows, width
