"""Weights of 4 or 8 bits a value with a scale for each group of input features.

Shapes: o output features, h input features, k columns, g groups of columns, t tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

QUARTER = 32
"""Columns between two values of a word."""
_PER_WORD = 4


def packs(columns: int) -> bool:
    """Whether rows of this many values of 4 bits are stored four to a word; others take a byte per value."""
    return columns % (_PER_WORD * QUARTER) == 0


def pack_nibbles(values_ok: Tensor) -> Tensor:
    """Values of 4 bits [o, k] in uint8 as words of 16 bits [o, k / 4]: of each 128 columns, c is in word c % 32.

    The first 32 are in the lowest bits. So a GPU widens two words, or two neighbours of each quarter, at once.
    """
    quarters = values_ok.unflatten(1, (-1, _PER_WORD, QUARTER)).int().unbind(2)
    words = sum((values << 4 * nibble for nibble, values in enumerate(quarters[1:], 1)), quarters[0])
    return words.to(torch.int16).flatten(1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    words = packed.unflatten(1, (-1, QUARTER))
    quarters = [(words >> 4 * nibble) & 15 for nibble in range(_PER_WORD)]
    return torch.stack(quarters, 2).to(torch.uint8).flatten(1)


@dataclass(frozen=True)
class Columns:
    """How columns of a weight follow from input features."""

    order: Tensor | None = None
    """[k] int64: the input feature of each column; None: they are the columns. Padding repeats any of them."""
    scales: Tensor | None = None
    """[h] fp32: what input features are multiplied by before the product."""

    @property
    def are_inputs(self) -> bool:
        """Whether they are the input features as they are."""
        return self.order is None and self.scales is None

    def of(self, x_th: Tensor) -> Tensor:
        """What the columns are multiplied by: [t, k]."""
        if self.scales is not None:
            x_th = (x_th * self.scales).to(x_th.dtype)
        return x_th if self.order is None else x_th.index_select(1, self.order)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(tensor.nbytes for tensor in (self.order, self.scales) if tensor is not None)

    def to(self, device: torch.device) -> "Columns":
        """On a device."""
        return Columns(*(None if each is None else each.to(device) for each in (self.order, self.scales)))


@dataclass(frozen=True)
class GroupedWeight:
    """A weight in whole numbers with a scale for each group of columns.

    Groups are of one size: column c of row o is `(value - zero) * scale`, both of group `c // (k / g)`. Columns that
    are padding are zeros.
    """

    values: Tensor
    """[o, k] uint8, or values of 4 bits [o, k / 4] int16 as `pack_nibbles` has them."""
    scales: Tensor
    """[g, o], floating point."""
    zeros: Tensor | None
    """[g, o] uint8; None: they are all `middle`."""
    middle: int
    """8 where values have 4 bits, 128 where they have 8."""
    in_features: int
    dtype: torch.dtype
    """Type that the model computes in."""
    columns: Columns = Columns()

    @property
    def shape(self) -> tuple[int, int]:
        """(o, h)."""
        return self.values.shape[0], self.in_features

    @property
    def num_columns(self) -> int:
        """Columns: k."""
        return self.in_features if self.columns.order is None else self.columns.order.shape[0]

    @property
    def group_size(self) -> int:
        """Columns of a group."""
        return self.num_columns // self.scales.shape[0]

    @property
    def is_packed(self) -> bool:
        """Whether a word holds four values."""
        return self.values.dtype == torch.int16

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a GPU."""
        return self.values.is_cuda

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.values.nbytes + self.scales.nbytes + zeros + self.columns.nbytes

    def to(self, device: torch.device) -> "GroupedWeight":
        """On a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        values, scales = self.values.to(device), self.scales.to(device)
        return replace(self, values=values, scales=scales, zeros=zeros, columns=self.columns.to(device))

    def integers(self, rows: slice = slice(None)) -> Tensor:
        """Values of some rows, a byte for each: [o, k]."""
        values = self.values[rows]
        return unpack_nibbles(values) if self.is_packed else values

    def widened(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Columns of some rows in a floating-point type: [o, k]."""
        zeros_og1 = self.middle if self.zeros is None else self.zeros[:, rows].t().unsqueeze(2).to(dtype)
        scales_og1 = self.scales[:, rows].t().unsqueeze(2).to(dtype)
        values_ogc = self.integers(rows).to(dtype).unflatten(1, (-1, self.group_size))
        return ((values_ogc - zeros_og1) * scales_og1).flatten(1)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight of the input features in `dtype`, [o, h], rounded once; it includes `columns.scales`."""
        wide = torch.promote_types(dtype, torch.float32)
        weight = self.widened(wide)
        if self.columns.order is not None:
            weight = weight.new_zeros(self.shape).index_add_(1, self.columns.order, weight)
        if self.columns.scales is not None:
            weight = weight * self.columns.scales.to(wide)
        return weight.to(dtype)


@dataclass(frozen=True)
class BlockedGroups:
    """A weight of 4 bits in the layout that torch's product on a CPU reads; rows of zeros may pad it."""

    values: Tensor
    """Opaque."""
    scales: Tensor
    """[g, o, 2] bf16: each value less 8 is multiplied by the first, and the second is added."""
    group_size: int
    columns: Columns
