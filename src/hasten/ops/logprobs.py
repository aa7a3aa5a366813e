"""Log-probabilities of a batch's tokens. Shapes: r rows, k most probable tokens."""

from typing import NamedTuple

import torch
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

    def packed(self, tokens_r: Tensor) -> Tensor:
        """The same side by side, with the rows' tokens [int32]: int32 [r, 3 + 2k], see `hasten.ops.packed_logprobs`."""
        own = (tokens_r, self.ranks_r, self.chosen_r.view(torch.int32))
        return torch.cat([*(each.unsqueeze(1) for each in own), self.values_rk.view(torch.int32), self.ids_rk], dim=1)
