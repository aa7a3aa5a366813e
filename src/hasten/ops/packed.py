"""Weights of linear layers: as they are loaded, and in the layout that their device reads fastest."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.ops.grouped import BlockedGroups, Columns, GroupedWeight
from hasten.ops.transfer import Upload


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of 8 bits an element with a scale for each output feature: row o is `values[o] * scales[o]`."""

    values: Tensor
    """[o, h] int8 or float8_e4m3fn"""
    scales: Tensor
    """[o] in fp32"""
    dtype: torch.dtype
    """Type that the model computes in: that of rows which are looked up."""
    inputs: torch.dtype | None = None
    """What inputs are rounded to before they are multiplied, with a scale for each token (`ops/rounding.py`): the type
    of the values. None: they keep their precision."""

    @property
    def shape(self) -> tuple[int, int]:
        """(o, h)."""
        out_features, in_features = self.values.shape
        return out_features, in_features

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a GPU."""
        return self.values.is_cuda

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, [o, h], rounded once."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.values.to(wide) * self.scales.to(wide).unsqueeze(1)).to(dtype)


Weight = Tensor | QuantizedWeight | GroupedWeight
"""A weight [o, h] in full precision, or quantized."""


def moved(weight: Weight, upload: Upload) -> Weight:
    """The weight on a device."""
    if isinstance(weight, Tensor):
        return upload(weight)
    if isinstance(weight, QuantizedWeight):
        return replace(weight, values=upload(weight.values), scales=upload(weight.scales))
    return weight.to(upload.device)


PACK_FOR_ROWS = 64
"""Batch size that a CPU's matrix library lays a weight out for; the layout serves other sizes as well."""


FUSED = {"gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}
"""Activations that oneDNN computes in a product, before the result is rounded: its name and its variant of each."""


@dataclass(frozen=True)
class IntegerPanels:
    """A weight `(values - zeros) * scales` of 8 or 4 bits in the layout of the kernels for a CPU.

    See `native/integers.py`; shapes: o output features, k columns, g groups of columns.
    """

    values: Tensor
    """Opaque."""
    scales: Tensor
    """[o / 32, g, 32] in fp32."""
    zeros: Tensor | None
    """The same in int32; None: they are all `zero`."""
    bits: int
    """8 or 4."""
    zero: int
    digits: int
    """Numbers of int8 that an input is rounded to: 1, or 2 for one of 15 bits."""
    group_size: int
    """Columns of a group, with those that pad a single one."""
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True)
class PackedLinear:
    """What `ops.pack_linear` makes and `ops.linear` takes; at least one of the layouts is there."""

    out_features: int
    in_features: int
    plain: Tensor | None
    """[o, h], with either axis innermost; where there are `scales` of 8 bits, and more columns of zeros may follow."""
    blocked: Tensor | None = None
    """An opaque layout of the device's matrix library."""
    panels: Tensor | None = None
    """The layout of the kernels for a CPU (`native/products.py`), in place of the others."""
    halves: Tensor | None = None
    """The same of a weight in bf16 (`native/bf16.py`)."""
    integers: IntegerPanels | None = None
    """The same of a weight of 8 or 4 bits."""
    scales: Tensor | None = None
    """[o] in fp32: what the rows of a quantized weight are multiplied by."""
    inputs: torch.dtype | None = None
    """As in `QuantizedWeight`."""
    grouped: GroupedWeight | None = None
    """A weight with scales of groups, in place of the others."""
    blocked_groups: BlockedGroups | None = None
    """The same for torch's product on a CPU, in place of the others."""
    by_rows: bool = False
    """Whether the kernels for a CPU multiply `plain`."""
    fixed_order: bool = False
    """Whether products are added up in an order that does not depend on the number of rows (`ops.fixed_order`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(o, h)."""
        return self.out_features, self.in_features

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a GPU."""
        held = self.plain, self.blocked, self.scales
        return any(each is not None and each.is_cuda for each in held)

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up in it, so that a weight in two uses need not lie there twice."""
        return self.halves is not None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight has scales."""
        return any(each is not None for each in (self.scales, self.integers, self.grouped, self.blocked_groups))

    @property
    def has_kernel(self) -> bool:
        """Whether the kernels for a CPU multiply it."""
        return any(each is not None for each in (self.panels, self.halves, self.integers))


Table = Weight | PackedLinear
"""What rows are looked up in; packed, if it `is_table`."""
