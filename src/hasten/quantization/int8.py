"""Weights in int8 with a scale for each output feature, as FasterTransformer's int8_mode 1 has them.

Activations stay as they are. Shapes: h input features, o output features.
"""

import torch
from torch import Tensor

from hasten.core.config import Quantization
from hasten.core.errors import CheckpointError
from hasten.ops import QuantizedWeight

_LARGEST = 127
_ELEMENTS = 1 << 24
"""Weights in fp32 at a time."""


class Int8:
    """Symmetric rounding to nearest: the largest magnitude of each output feature becomes 127."""

    name: Quantization = "int8"

    @property
    def head(self) -> "Int8":
        """See `Scheme.head`."""
        return self

    def quantize(self, weight_oh: Tensor, name: str) -> QuantizedWeight:
        """See `Scheme.quantize`; CheckpointError for a weight with NaN or infinity."""
        values = torch.empty(weight_oh.shape, dtype=torch.int8, device=weight_oh.device)
        scales = torch.empty(weight_oh.shape[0], dtype=torch.float32, device=weight_oh.device)
        rows = max(1, _ELEMENTS // weight_oh.shape[1])
        for start in range(0, weight_oh.shape[0], rows):
            piece = slice(start, start + rows)
            wide_oh = weight_oh[piece].float()
            scales_o = wide_oh.abs().amax(1).div_(_LARGEST)
            scales_o.masked_fill_(scales_o == 0, 1.0)  # a row of zeros, such as what pads a vocabulary
            scales[piece] = scales_o
            values[piece] = wide_oh.div(scales_o.unsqueeze(1)).round_()
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"tensor {name} has NaN or infinity in row {int((~scales.isfinite()).nonzero()[0])}, which int8 cannot "
                "hold: the checkpoint is damaged, or its training diverged"
            )
        return QuantizedWeight(values, scales, weight_oh.dtype)
