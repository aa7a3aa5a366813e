"""What a rank loads of a checkpoint in full precision."""

from typing import Any

import torch
from torch import Tensor

from hasten.checkpoint.plan import Checkpoint, rank_tensors


def rank_shards(
    checkpoint: Checkpoint, rank: int, size: int, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Tensor]:
    """The rank's parameters by name, none of which is quantized."""
    found = {}
    for name, weight in rank_tensors(checkpoint, rank, size, dtype, **options):
        assert isinstance(weight, Tensor)
        found[name] = weight
    return found
