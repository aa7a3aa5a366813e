"""What happens to queries and keys between their projection and the cache."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadTransform:
    """A norm of each query and key head, then a rotation by its position; either may be absent.

    The first r dimensions of a head turn, dimension i < r / 2 together with i + r / 2. Source: Su et al., "RoFormer:
    Enhanced Transformer with Rotary Position Embedding", 2021.
    """

    positions_t: Tensor
    """[t]"""
    table_pr: Tensor | None = None
    """[positions, r] in fp32: r / 2 cosines, then as many sines, of each position."""
    query_norm_d: Tensor | None = None
    """[d]: the weight of a root mean square norm over each query head."""
    key_norm_d: Tensor | None = None
    """[d]: that of the key heads; given where `query_norm_d` is."""
    eps: float = 0.0
    unit_offset: bool = False
    """Of both norms; with an offset their weights are one more than these."""
