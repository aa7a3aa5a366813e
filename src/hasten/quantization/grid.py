"""Grids: the values that a weight is rounded to, numbers of a type times a scale of each group of input features.

Shapes: o output features, h input features, g groups of input features, c input features of a group.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.rounding import LARGEST, divided

E4M3 = torch.float8_e4m3fn
_SMALLEST_FACTOR, _FACTORS = 0.6, 20
"""Scales that are tried instead of that of the largest magnitude: factors of it in equal steps up to 1."""


@dataclass(frozen=True)
class RoundedWeight:
    """A weight [o, h] on a grid."""

    numbers: Tensor
    """[o, h] in the grid's type."""
    scales: Tensor
    """[o, g], floating point."""
    group_size: int
    """Input features of a group; the last one may have fewer."""

    def dequantized(self) -> Tensor:
        """The values, [o, h] in fp32."""
        in_features = self.numbers.shape[1]
        return self.numbers.float() * spread(self.scales.float(), self.group_size, in_features)


def spread(scales_og: Tensor, group_size: int, in_features: int) -> Tensor:
    """The scale of each input feature: [o, h]."""
    return scales_og.repeat_interleave(group_size, 1)[:, :in_features]


@dataclass(frozen=True)
class Grid:
    """Whole numbers of 4 or 8 bits, or numbers of e4m3, with symmetric scales."""

    bits: int
    dtype: torch.dtype = torch.int8
    """int8, in which those of 4 bits are too, or float8_e4m3fn."""
    group_size: int | None = None
    """None: one scale per output feature."""

    @property
    def largest(self) -> float:
        """What the largest magnitude of a group becomes: of whole numbers half a step beyond the last one.

        Rounding then errs by half a step at most at either end, of which the negative one has a number more.
        """
        return LARGEST[E4M3] if self.dtype == E4M3 else (1 << (self.bits - 1)) - 0.5

    def nearest(self, ratios: Tensor) -> Tensor:
        """Numbers of the grid nearest to multiples of a scale, in fp32."""
        if self.dtype == E4M3:
            return ratios.clamp(-self.largest, self.largest).to(E4M3).float()
        middle = 1 << (self.bits - 1)
        return ratios.round().clamp_(-middle, middle - 1)

    def size(self, in_features: int) -> int:
        """Input features of a group of a weight."""
        return self.group_size or in_features

    def scales(self, weight_oh: Tensor, dtype: torch.dtype, importance_h: Tensor | None = None) -> Tensor:
        """Scales [o, g] in `dtype` for a weight in fp32.

        By the largest magnitudes, or with the importance of input features by the least sum of squared rounding errors,
        each times that of its feature.
        """
        size = self.size(weight_oh.shape[1])
        more = -weight_oh.shape[1] % size
        grouped = F.pad(weight_oh, (0, more)).unflatten(1, (-1, size))
        largest_og = divided(grouped.abs().amax(2), self.largest)
        if importance_h is None or self.dtype == E4M3:
            return largest_og.to(dtype)
        importance_gc = F.pad(importance_h, (0, more)).unflatten(0, (-1, size))
        best = largest_og.to(dtype)
        least = self._errors(grouped, best, importance_gc)
        for step in range(_FACTORS):
            factor = _SMALLEST_FACTOR + (1 - _SMALLEST_FACTOR) * step / _FACTORS
            tried = (largest_og * factor).to(dtype)
            errors = self._errors(grouped, tried, importance_gc)
            best = torch.where(errors < least, tried, best)
            least = torch.minimum(errors, least)
        return best

    def _errors(self, grouped_ogc: Tensor, scales_og: Tensor, importance_gc: Tensor) -> Tensor:
        steps_og1 = nonzero(scales_og.float()).unsqueeze(2)
        rounded = self.nearest(grouped_ogc / steps_og1).mul_(steps_og1).sub_(grouped_ogc)
        return rounded.square_().mul_(importance_gc).sum(2)

    def rounded(self, weight_oh: Tensor, scales_og: Tensor) -> RoundedWeight:
        """A weight in fp32 rounded to nearest."""
        in_features = weight_oh.shape[1]
        size = self.size(in_features)
        steps_oh = spread(nonzero(scales_og.float()), size, in_features)
        return RoundedWeight(self.nearest(weight_oh / steps_oh).to(self.dtype), scales_og, size)


def nonzero(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 for those of groups of zeros."""
    return scales.masked_fill(scales == 0, 1.0)
