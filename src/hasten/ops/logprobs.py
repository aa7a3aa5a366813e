"""Log-probabilities of a batch's tokens. Shapes: r rows, k most probable tokens."""

from typing import NamedTuple

from torch import Tensor


class TopLogprobs(NamedTuple):
    """Log-probabilities of one token per row, and of the most probable ones."""

    chosen_r: Tensor
    """fp32, of the row's token."""
    ranks_r: Tensor
    """int32, of the row's token: 1 plus the number of tokens with a greater logit."""
    values_rk: Tensor
    """fp32, in descending order."""
    ids_rk: Tensor
    """int32; among equals the lowest id first."""
