"""Normalisation over the hidden axis."""

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops


class LayerNorm(nn.Module):
    """Layer norm with weight and bias; every rank holds it whole."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x_th: Tensor | ops.PartialSum) -> tuple[Tensor, Tensor]:
        """Normalised [t, h], and what was normalised, added up: [t, h]."""
        return ops.layer_norm(x_th, self.weight, self.bias, self.eps)
