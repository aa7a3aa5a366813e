"""Weights of 4 bits with a scale for each group of 128 input features. Activations stay as they are.

Shapes: h input features, o output features, g groups.
"""

import torch
from torch import Tensor

from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError
from hasten.layers.embedding import Head
from hasten.layers.linear import PackedModule
from hasten.ops import Weight
from hasten.quantization.eight_bit import INT8, EightBit
from hasten.quantization.grid import Grid
from hasten.quantization.stored import StoredWeight, pack_groups

GROUP_SIZE = 128
_MIDDLE = 8
_GRID = Grid(4, group_size=GROUP_SIZE)
_ELEMENTS = 1 << 24
"""Weights in fp32 at a time."""


class Int4:
    """Symmetric rounding to nearest; scales are of type bf16, which every type that a model computes in can hold."""

    name: Quantization = "int4"

    def of(self, layer: PackedModule) -> "Int4 | EightBit":
        """See `Scheme.of`: the head is in int8."""
        return INT8 if isinstance(layer, Head) else self

    def quantize(self, weight_oh: Tensor, name: str) -> Weight:
        """See `Scheme.quantize`; CheckpointError for a weight with NaN or infinity."""
        out_features, in_features = weight_oh.shape
        groups = -(-in_features // GROUP_SIZE)
        values = torch.empty(weight_oh.shape, dtype=torch.uint8, device=weight_oh.device)
        scales = torch.empty(out_features, groups, dtype=torch.bfloat16, device=weight_oh.device)
        rows = max(1, _ELEMENTS // in_features)
        for start in range(0, out_features, rows):
            piece = slice(start, start + rows)
            wide_oh = weight_oh[piece].float()
            scales[piece] = _GRID.scales(wide_oh, torch.bfloat16)
            values[piece] = _GRID.rounded(wide_oh, scales[piece]).numbers + _MIDDLE
        if not bool(scales.isfinite().all()):
            row = int((~scales.isfinite()).any(1).nonzero()[0])
            raise CheckpointError(
                f"tensor {name} has NaN or infinity in row {row}, which int4 cannot hold: the checkpoint is damaged, "
                "or its training diverged"
            )
        groups_h = torch.arange(in_features, device=weight_oh.device) // GROUP_SIZE
        return pack_groups(
            StoredWeight(values, scales, pack_groups, groups_h=groups_h, middle=_MIDDLE), weight_oh.dtype
        )
