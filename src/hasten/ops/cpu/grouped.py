"""Products with weights that have scales of groups, on a CPU. Shapes: t tokens, o output features, k columns, g groups.

The kernels of `native/integers.py` multiply where they can, by inputs of 15 bits. Elsewhere torch has a product for 4
bits, in bf16: activations, scales and results are rounded to it, sums are in fp32. In both a token's result does not
depend on its neighbours. What neither takes is widened to fp32, a block of output features at a time, which saves
memory and not time.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops import native
from hasten.ops.grouped import BlockedGroups, GroupedWeight
from hasten.ops.packed import PackedLinear

_GROUP_SIZES = (256, 128, 64, 32)
"""Those that torch's product takes."""
_FEATURES_MULTIPLE = 64
"""Of output features, so that all of them take the fastest of its loops."""
_FEATURES = 256
"""Output features that are widened to fp32 at a time: few enough to be in the cache when they are multiplied."""


def pack_linear(weight: GroupedWeight) -> PackedLinear:
    """In the layout of the kernels, or of torch's product, where these take the weight."""
    kernels, bits = native.integer_kernels(), 4 if weight.middle == 8 else 8
    if kernels is not None and kernels.fits(weight.num_columns, weight.group_size):
        operands = weight.integers(), weight.scales, weight.zeros
        panels = kernels.pack(*operands, bits=bits, digits=2, columns=weight.columns)
        return PackedLinear(*weight.shape, plain=None, integers=panels)
    size = next((size for size in _GROUP_SIZES if weight.group_size % size == 0), None)
    if size is None or weight.middle != 8:
        return PackedLinear(*weight.shape, plain=None, grouped=weight)
    return PackedLinear(*weight.shape, plain=None, blocked_groups=_blocked(weight, size))


def _blocked(weight: GroupedWeight, size: int) -> BlockedGroups:
    more = -weight.shape[0] % _FEATURES_MULTIPLE
    values = F.pad(weight.integers(), (0, 0, 0, more)).int()
    scales_go = weight.scales.float()
    zeros_go = torch.zeros_like(scales_go) if weight.zeros is None else (8 - weight.zeros.float()) * scales_go
    pairs = torch.stack((scales_go, zeros_go), 2).repeat_interleave(weight.group_size // size, 0)
    return BlockedGroups(
        values=torch._convert_weight_to_int4pack_for_cpu(values, 1),
        scales=F.pad(pairs, (0, 0, 0, more)).bfloat16().contiguous(),
        group_size=size,
        columns=weight.columns,
    )


def product(x_th: Tensor, weight: PackedLinear) -> Tensor:
    """`x @ weight.T` of fp32: [t, o]."""
    blocked = weight.blocked_groups
    if blocked is None:
        assert weight.grouped is not None
        return _widened(x_th, weight.grouped)
    columns_tk = blocked.columns.of(x_th).bfloat16()
    out_to = torch._weight_int4pack_mm_for_cpu(columns_tk, blocked.values, blocked.group_size, blocked.scales)
    return out_to[:, : weight.out_features].float()


def _widened(x_th: Tensor, weight: GroupedWeight) -> Tensor:
    columns_tk = weight.columns.of(x_th)
    starts = range(0, weight.shape[0], _FEATURES)
    blocks = (weight.widened(torch.float32, slice(start, start + _FEATURES)) for start in starts)
    return torch.cat([F.linear(columns_tk, block_ok) for block_ok in blocks], dim=1)
