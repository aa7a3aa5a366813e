"""Normalisation over the hidden axis; every rank holds the weights whole."""

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.core.model_config import QKNorm
from hasten.parallel.groups import ALONE, TensorGroup


class LayerNorm(nn.Module):
    """Layer norm with a weight, and with a bias or without."""

    def __init__(self, size: int, *, eps: float, bias: bool = True, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.group = group
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    def forward(
        self, x_th: Tensor | ops.PartialSum, reader: ops.PackedLinear | None = None
    ) -> tuple[ops.Inputs, Tensor]:
        """Normalised [t, h], and what was normalised, added up: [t, h].

        `reader`: the weight that alone multiplies the norm, which may be rounded as that needs it.
        """
        return ops.norm(self.group.reduced(x_th), self.weight, self.bias, self.eps, reader=reader)

    def alone(self, x_th: Tensor | ops.PartialSum) -> Tensor:
        """Normalised [t, h], where nobody reads what was normalised."""
        return ops.norm_alone(self.group.reduced(x_th), self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """Weight and bias of a norm of each query head, or each key head, of this rank; `ops.project` computes it."""

    def __init__(self, kind: QKNorm, heads: int, head_size: int) -> None:
        super().__init__()
        size = head_size * (heads if kind in ("rms_of_all_heads", "layer_by_head") else 1)
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if kind == "layer" else None


class RMSNorm(nn.Module):
    """Root mean square norm with a weight, or with a weight that is stored less one (`unit_offset`)."""

    def __init__(self, size: int, *, eps: float, unit_offset: bool = False, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.group = group
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(
        self, x_th: Tensor | ops.PartialSum, reader: ops.PackedLinear | None = None
    ) -> tuple[ops.Inputs, Tensor]:
        """Normalised [t, h], and what was normalised, added up: [t, h]. `reader`: as in `LayerNorm`."""
        x_th = self.group.reduced(x_th)
        return ops.norm(x_th, self.weight, None, self.eps, rms=True, unit_offset=self.unit_offset, reader=reader)
