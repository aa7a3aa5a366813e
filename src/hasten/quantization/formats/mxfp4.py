"""gpt-oss's experts in MXFP4: 4 bits in groups of 32 input features, each with a power of two as its scale.

Nothing computes on them as they are stored: they are dequantized to bf16, which holds every value exactly.
Source: Rouhani et al., "OCP Microscaling Formats (MX) Specification", 2023.
Shapes: e experts, o output features, h input features, g groups of input features.
"""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.quantization.formats.base import Module, find

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
"""By their 4 bits, the highest of which is the sign."""
_GROUP = 32
_EXPONENT_BIAS, _NAN = 127, 255
"""Of a scale, which is an exponent of 2; the second stands for no number."""


class MXFP4:
    """`quant_method` mxfp4, in which stacked weights of experts are quantized and all others are not."""

    name = "mxfp4"
    is_held = False
    cache_dtype = None

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """The configuration says nothing but which modules are not quantized, which their tensors show."""

    def find(self, module: str, names: Container[str]) -> Mapping[str, str] | None:
        """See `Format.find`."""
        return find(module, names, ("blocks", "scales"), (), self.name, separator="_")

    def is_leftover(self, name: str) -> bool:
        """There are none."""
        return False

    def read(self, module: Module) -> Tensor:
        """See `Format.read`: [e, h, o] in bf16, as full-precision checkpoints of gpt-oss have it."""
        experts, in_features, out_features = module.shape
        if in_features % _GROUP:
            raise module.fail("blocks", f"is of {in_features} input features, no multiple of {_GROUP}")
        of_groups, byte = (experts, out_features, in_features // _GROUP), (torch.uint8,)
        blocks = module.tensor("blocks", (*of_groups, _GROUP // 2), byte, self.name)
        scales = module.tensor("scales", of_groups, byte, self.name)
        if bool((scales == _NAN).any()):
            raise module.fail("scales", "has NaN: the checkpoint is damaged; copy it again")
        return dequantized(blocks, scales).transpose(1, 2)


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """Two numbers a byte [e, o, g, 16], the lower bits first, times 2^(scale - 127) [e, o, g]: [e, o, h] in bf16."""
    values, byte = torch.tensor(_VALUES, dtype=torch.bfloat16), torch.arange(256)
    # both numbers of a byte as one of 4 bytes, which torch looks up five times as fast as two of 2
    pairs = torch.stack((values[byte % 16], values[byte // 16]), dim=1).view(torch.int32).squeeze(1)
    powers = torch.ldexp(torch.ones(256), byte - _EXPONENT_BIAS).to(torch.bfloat16)
    weights = torch.empty(*blocks.shape[:-1], _GROUP, dtype=torch.bfloat16)
    # expert by expert: what is made on the way is larger than the result
    for target, block, scale in zip(weights, blocks, scales, strict=True):
        unscaled = pairs.index_select(0, block.flatten().int()).view(torch.bfloat16).view(target.shape)
        torch.mul(unscaled, powers[scale.int()].unsqueeze(-1), out=target)
    return weights.flatten(-2)
