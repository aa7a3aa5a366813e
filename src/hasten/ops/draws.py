"""Parameters of the random draws of a batch: temperature, filters and points of each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.ops.transfer import to_device

NONE_LEFT = -2
"""In place of a token: all logits of the row are minus infinity."""


@dataclass(frozen=True)
class Draws:
    """Sampling parameters of r rows, on the device of their logits.

    All are in one tensor, so that one copy brings them there. In fp64: a temperature beyond fp32 is allowed, and a
    point just below 1 must stay below it.
    """

    packed_r5: Tensor
    """Temperature, top-k, top-p, min-p and point of each row."""
    filters: bool
    """Whether any row has a filter, known on the host."""

    @classmethod
    def of(
        cls,
        *,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        point: Sequence[float],
        device: torch.device,
    ) -> "Draws":
        """The parameters of each row: `top_k` 0 keeps all tokens, `point` is a uniform number in [0, 1)."""
        rows = list(zip(temperature, top_k, top_p, min_p, point, strict=True))
        filters = any(k > 0 or top < 1 or low > 0 for _, k, top, low, _ in rows)
        return cls(to_device(rows, torch.float64, device), filters)

    @property
    def temperature_r1(self) -> Tensor:
        """Positive."""
        return self.packed_r5[:, 0:1]

    @property
    def top_k_r1(self) -> Tensor:
        """So many tokens are kept; 0 keeps all. Whole numbers, though not of a whole type."""
        return self.packed_r5[:, 1:2]

    @property
    def top_p_r1(self) -> Tensor:
        """Tokens are kept until their probabilities reach it; 1 keeps all."""
        return self.packed_r5[:, 2:3]

    @property
    def min_p_r1(self) -> Tensor:
        """Least probability, relative to the greatest; 0 keeps all."""
        return self.packed_r5[:, 3:4]

    @property
    def point_r1(self) -> Tensor:
        """Where the cumulative distribution is inverted."""
        return self.packed_r5[:, 4:5]
