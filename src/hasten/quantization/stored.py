"""A quantized weight as a checkpoint holds it, unpacked, and a rank's shard of it.

Shapes: o output features, h input features, g groups of input features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.core.model_config import AttentionConfig
from hasten.models.weight_map import SAME, WeightSpec
from hasten.ops import Columns, GroupedWeight, QuantizedWeight, Weight, pack_nibbles, packs
from hasten.parallel.shard import Split, split

Pack = Callable[["StoredWeight", torch.dtype], Weight]
"""Makes what `ops` multiplies by, of a rank's shard and the type that the model computes in."""
_LEAST_GROUP = 16
"""Columns; smaller groups are padded."""
_PADDED_GROUP = 32


@dataclass(frozen=True)
class StoredWeight:
    """One linear layer's weight: `(values - zeros) * scales`, output features first, every value a byte."""

    values: Tensor
    """[o, h]: whole numbers, or floating-point numbers of 8 bits."""
    scales: Tensor
    """[o, g], floating point."""
    pack: Pack
    zeros: Tensor | None = None
    """[o, g] uint8; None: `middle` for whole numbers without sign, else 0."""
    groups_h: Tensor | None = None
    """[h] int64: the group of each input feature; None: there is one group."""
    middle: int = 0
    """What stands for zero where there are no zeros."""
    input_scales: Tensor | None = None
    """[h] fp32: what input features are multiplied by before the product."""

    @property
    def groups(self) -> Tensor:
        """[h] int64: the group of each input feature."""
        return (
            self.values.new_zeros(self.values.shape[1], dtype=torch.int64) if self.groups_h is None else self.groups_h
        )

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight, [o, h], rounded once; it includes the input features' scales."""
        zeros = self.middle if self.zeros is None else self.zeros.float()[:, self.groups]
        weight = (self.values.float() - zeros) * self.scales.float()[:, self.groups]
        return (weight if self.input_scales is None else weight * self.input_scales).to(dtype)

    def fits(self, other: "StoredWeight") -> bool:
        """Whether the output features of both can be those of one weight."""
        pairs = ((self.zeros, other.zeros), (self.input_scales, other.input_scales))
        return (
            self.pack is other.pack
            and self.middle == other.middle
            and self.values.dtype is other.values.dtype
            and self.scales.shape[1] == other.scales.shape[1]
            and all((left is None) == (right is None) for left, right in pairs)
            and torch.equal(self.groups, other.groups)
        )


def shard(
    spec: WeightSpec, stored: Sequence[StoredWeight], rank: int, size: int, attention: AttentionConfig
) -> StoredWeight:
    """Rank `rank`'s shard of `size` of a weight from its sources, which fit each other.

    A split of input features may cut a group: both ranks then have its scale.
    """
    sources = tuple(replace(each, layout=SAME) if each.layout.transposed else each for each in spec.sources)
    spec = replace(spec, sources=sources)
    of_scales = replace(spec, split=Split.REPLICATE) if spec.split is Split.ROW else spec
    first = stored[0]

    def whole(tensors: list[Tensor], spec: WeightSpec) -> Tensor:
        return spec.shard(tensors, rank, size, attention).contiguous()

    def of_inputs(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or spec.split is not Split.ROW:
            return tensor
        return split(tensor.unsqueeze(0), Split.ROW, rank, size, attention).squeeze(0)

    zeros = [each.zeros for each in stored if each.zeros is not None]
    return replace(
        first,
        values=whole([each.values.view(torch.uint8) for each in stored], spec).view(first.values.dtype),
        scales=whole([each.scales for each in stored], of_scales),
        zeros=whole(zeros, of_scales) if zeros else None,
        groups_h=of_inputs(first.groups_h),
        input_scales=of_inputs(first.input_scales),
    )


def pack_groups(stored: StoredWeight, dtype: torch.dtype) -> Weight:
    """Whole numbers of 4 or 8 bits without sign in the layout of their width; 8 bits with one scale a row as int8."""
    zeros = None if stored.zeros is None or bool((stored.zeros == stored.middle).all()) else stored.zeros
    groups = stored.groups
    order = groups.argsort(stable=True)
    in_place = bool((groups[1:] >= groups[:-1]).all())
    present, counts = groups[order].unique_consecutive(return_counts=True)
    if stored.middle == 128 and zeros is None and len(present) == 1 and stored.input_scales is None:
        scales = stored.scales[:, present[0]].float()
        return QuantizedWeight((stored.values ^ 128).view(torch.int8), scales.contiguous(), dtype)
    size = math.gcd(*counts.tolist())
    if size < _LEAST_GROUP and len(present) > 1:
        size = _PADDED_GROUP
        order, padding, counts = _padded(order, counts, size)
        in_place = False
        group_k = present.repeat_interleave(counts)
        zeros_ok = stored.middle if zeros is None else zeros[:, group_k]
        values = torch.where(padding, zeros_ok, stored.values[:, order]).to(torch.uint8)
    else:
        values = stored.values.contiguous() if in_place else stored.values[:, order]
    of_groups = present.repeat_interleave(counts // size)
    return GroupedWeight(
        pack_nibbles(values) if stored.middle == 8 and packs(len(order)) else values,
        stored.scales[:, of_groups].t().contiguous(),
        None if zeros is None else zeros[:, of_groups].t().contiguous(),
        stored.middle,
        stored.values.shape[1],
        dtype,
        Columns(None if in_place else order, stored.input_scales),
    )


def _padded(order: Tensor, counts: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each group filled up to a multiple of columns: their input features, which of them are padding, and counts.

    All columns together are a multiple of four times as many.
    """
    more = -counts % multiple
    more[-1] += -(counts + more).sum() % (4 * multiple)
    parts = zip(order.split(counts.tolist()), more.tolist(), strict=True)
    filled = [torch.cat((part, part[:1].expand(extra))) for part, extra in parts]
    pairs = zip(counts.tolist(), more.tolist(), strict=True)
    padding = torch.cat([torch.arange(real + extra) >= real for real, extra in pairs])
    return torch.cat(filled), padding.to(order.device), counts + more
