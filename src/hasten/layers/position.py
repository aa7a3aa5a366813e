"""How attention learns of positions."""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slope of each head, [heads] in fp32, for any number of heads.

    For a power of two p the slopes are 2^(-8/p), 2^(-16/p), ... Other counts take those of the power of two below and
    fill up with every other slope of the power of two above.
    Source: Press, Smith, Lewis, "Train Short, Test Long", 2022.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(num_heads - below)]
    return torch.tensor(slopes, dtype=torch.float32)
