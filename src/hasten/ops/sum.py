"""A sum that is not made yet: its reader adds it up while it reads."""

from dataclasses import dataclass

from torch import Tensor

from hasten.ops.peers import Peers


@dataclass(frozen=True)
class Sum:
    """A linear layer's output that the next norm completes."""

    parts: Tensor
    """[t, h], or [parts, t, h] in fp32: what a product over parts of its input features gave."""
    bias: Tensor | None = None
    """[h]"""
    residual: Tensor | None = None
    """[t, h], or more rows, of which `rows` tells the ones to take."""
    rows: Tensor | None = None
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
