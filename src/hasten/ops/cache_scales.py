"""Keys and values of a cache in 8 bits. Shapes: t tokens, n query heads, m key/value heads, d head size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.ops.rounding import LARGEST, divided

_LEAST = 1e-20
"""Range of a head whose values are all zero: its scale must have an inverse."""


@dataclass(frozen=True)
class CacheScales:
    """What the values of a cache in int8 or fp8 stand for: a stored value times the scale of its head.

    Scales do not change while the cache is in use, so that a token's keys and values depend on nothing but the token
    and those before it. Values beyond the range become its ends.
    """

    scales_2m: Tensor
    """[2, m] in fp32: those of keys, then those of values."""
    inverses_2m: Tensor
    """[2, m] in fp32: what keys and values are multiplied by before they are rounded."""

    @classmethod
    def of(cls, ranges_2m: Tensor, dtype: torch.dtype) -> "CacheScales":
        """The scales with which the largest number of `dtype` stands for the end of each head's range."""
        scales_2m = divided(ranges_2m.float().clamp(min=_LEAST), LARGEST[dtype])
        return cls(scales_2m, scales_2m.reciprocal())


def stored(heads_tmd: Tensor, inverses_m: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of 8 bits holds them: [t, m, d]."""
    numbers_tmd = (heads_tmd.float() * inverses_m.unsqueeze(1)).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (numbers_tmd.round_() if dtype == torch.int8 else numbers_tmd).to(dtype)


def octets(cache: Tensor) -> Tensor:
    """A view in a type that torch copies and indexes on every device, where it does not do so with the cache's own."""
    return cache.view(torch.int8) if cache.dtype == torch.float8_e4m3fn else cache


def widened(values: Tensor) -> Tensor:
    """Values of a cache, or of a part of one, in fp32 and not yet multiplied by scales."""
    if values.dtype != torch.float8_e4m3fn or values.is_cuda:
        return values.float()
    # a CPU converts one number at a time, and looks eight up in that time
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return table.index_select(0, values.flatten().view(torch.uint8).int()).view(values.shape)
