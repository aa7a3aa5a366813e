"""What a mixture of experts computes with: its weights as their device reads them, and which experts see a token."""

from dataclasses import dataclass, field

from torch import Tensor

from hasten.ops.packed import PackedLinear


@dataclass(frozen=True)
class PackedExperts:
    """What `ops.pack_experts` makes and `ops.experts` takes; at least one of the two layouts is there."""

    count: int
    """Experts of this rank, which lie next to each other among all."""
    first: int
    """The first of them."""
    gate_up: Tensor | None = None
    """[count, 2 * i, h]: the gate's features, then the others."""
    down: Tensor | None = None
    """[count, h, i]"""
    linears: tuple[tuple[PackedLinear, PackedLinear], ...] = ()
    """Both products of each expert."""
    gate_up_bias: Tensor | None = None
    """[count, 2 * i]"""
    down_bias: Tensor | None = None
    """[count, h]"""
    fixed_order: bool = field(default=False, kw_only=True)
    """As in `PackedLinear`; that of the sum over a token's experts too."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, hidden size, inner size, of weights that are stacked."""
        assert self.down is not None
        count, hidden, inner = self.down.shape
        return count, hidden, inner


@dataclass(frozen=True)
class Routing:
    """The experts that each token goes to."""

    experts_tk: Tensor
    """[t, k] int32: distinct experts, the most probable first."""
    weights_tk: Tensor
    """[t, k] in fp32: what their outputs are multiplied by."""
    counts_be: Tensor | None = None
    """[b, e] int32, on a GPU: how many tokens of each block of tokens go to each expert."""
    block: int = 0
    """Tokens of a block."""
