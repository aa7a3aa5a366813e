"""Parameters of norms and rotations of queries and keys, between their projection and the cache."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadTransform:
    """A norm of each query and key head, then a rotation by its position; either may be absent.

    The first r dimensions of a head turn, dimension i < r / 2 together with i + r / 2, or, `interleaved`, 2i together
    with 2i + 1. Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """

    positions_t: Tensor
    """[t]"""
    table_pr: Tensor | None = None
    """[positions, r] in fp32: r / 2 cosines, then as many sines, of each position."""
    interleaved: bool = False
    query_norm_d: Tensor | None = None
    """[d]: the weight of a norm over each query head; or [n * d], where each head has its own."""
    key_norm_d: Tensor | None = None
    """[d] or [m * d]: that of the key heads; given where `query_norm_d` is."""
    query_bias_d: Tensor | None = None
    """[d]: the bias of that norm."""
    key_bias_d: Tensor | None = None
    """[d]: that of the key heads; given where `query_bias_d` is."""
    mean_squares_t2: Tensor | None = None
    """[t, 2] in fp32, for root mean square norms over all heads together: what `ops.mean_squares` gives."""
    rms: bool = True
    """Root mean square norms; False: layer norms."""
    eps: float = 0.0
    unit_offset: bool = False
    """Of both norms; with an offset their weights are one more than these."""

    @property
    def only_turns(self) -> bool:
        """Whether there is a rotation and no norm."""
        return self.table_pr is not None and self.query_norm_d is None
