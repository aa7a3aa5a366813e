"""A linear layer's weight in the layout that its device reads fastest."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PackedLinear:
    """What `ops.pack_linear` makes and `ops.linear` takes; at least one of the two layouts is there."""

    out_features: int
    in_features: int
    plain: Tensor | None
    """[o, h], with either axis innermost."""
    blocked: Tensor | None = None
    """An opaque layout of the device's matrix library."""
