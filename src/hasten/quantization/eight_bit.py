"""Weights of 8 bits with a scale for each output feature: `int8`, `w8a8` and `fp8`.

`int8`, which FasterTransformer calls int8_mode 1, leaves activations as they are; the others round those of each token
to the type of the weights, with a scale for each token (`ops/rounding.py`). Shapes: h input features, o output ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.layers.embedding import Head
from hasten.layers.linear import PackedModule, QKVLinear
from hasten.ops import QuantizedWeight, multiplies
from hasten.ops.rounding import LARGEST, divided

_ELEMENTS = 1 << 24
"""Weights in fp32 at a time."""


@dataclass(frozen=True)
class EightBit:
    """Symmetric rounding to nearest: the largest magnitude of each output feature becomes the type's largest value."""

    name: Quantization
    values: torch.dtype
    """int8 or float8_e4m3fn"""
    inputs: torch.dtype | None = None
    """What activations are rounded to; None where they are not."""
    of_head: "EightBit | None" = None
    """What the head is quantized with, where that is something else."""
    of_qkv: "EightBit | None" = None
    """The same of the projections to queries, keys and values."""

    def of(self, layer: PackedModule) -> "EightBit":
        """See `Scheme.of`."""
        other = self.of_head if isinstance(layer, Head) else self.of_qkv if isinstance(layer, QKVLinear) else None
        return other or self

    def quantize(self, weight_oh: Tensor, name: str) -> QuantizedWeight:
        """See `Scheme.quantize`; CheckpointError for a weight with NaN or infinity."""
        if not multiplies(self.values, weight_oh.device):
            raise UnsupportedError(
                f"quantization {self.name} needs a GPU of compute capability 8.9 or later, which multiplies in fp8; "
                "int8 and w8a8 run on this one"
            )
        values = torch.empty(weight_oh.shape, dtype=self.values, device=weight_oh.device)
        scales = torch.empty(weight_oh.shape[0], dtype=torch.float32, device=weight_oh.device)
        largest = LARGEST[self.values]
        rows = max(1, _ELEMENTS // weight_oh.shape[1])
        for start in range(0, weight_oh.shape[0], rows):
            piece = slice(start, start + rows)
            wide_oh = weight_oh[piece].float()
            scales_o = divided(wide_oh.abs().amax(1), largest)
            scales_o.masked_fill_(scales_o == 0, 1.0)  # a row of zeros, such as what pads a vocabulary
            scales[piece] = scales_o
            steps_oh = wide_oh.div(scales_o.unsqueeze(1)).clamp_(-largest, largest)
            values[piece] = steps_oh.round_() if self.values == torch.int8 else steps_oh.to(self.values)
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"tensor {name} has NaN or infinity in row {int((~scales.isfinite()).nonzero()[0])}, which {self.name} "
                "cannot hold: the checkpoint is damaged, or its training diverged"
            )
        return QuantizedWeight(values, scales, weight_oh.dtype, self.inputs)


INT8 = EightBit("int8", torch.int8)
# What norms leave for attention has a few channels of large values, which int8 keeps at the cost of all others.
W8A8 = EightBit("w8a8", torch.int8, torch.int8, of_qkv=INT8)
FP8 = EightBit("fp8", torch.float8_e4m3fn, torch.float8_e4m3fn, of_head=INT8)
