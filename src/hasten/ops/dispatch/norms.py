"""Rows of tables, norms, and multiples."""

from typing import TYPE_CHECKING, overload

from torch import Tensor

from hasten.ops import cpu
from hasten.ops.packed import PackedLinear, Table
from hasten.ops.partial_sum import PartialSum
from hasten.ops.rounding import Inputs

if TYPE_CHECKING:
    pass


def embedding(ids_t: Tensor, weight_vh: Table, first: int | None = None) -> Tensor:
    """Rows of `weight_vh` for token ids [t], in the type of hidden states (`hidden_dtype`).

    With `first`, the weight is a shard of the vocabulary that begins there: ids outside it, which other ranks hold,
    give zeros.
    """
    if ids_t.is_cuda:
        from hasten.ops.gpu import norm as kernels

        assert not isinstance(weight_vh, PackedLinear), "a table of a GPU is never packed"
        return kernels.embedding(ids_t, weight_vh, first)
    return cpu.norms.embedding(ids_t, weight_vh, first)


@overload
def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: PackedLinear | None,
) -> tuple[Inputs, Tensor]: ...


def norm(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
    reader: PackedLinear | None = None,
) -> tuple[Inputs, Tensor]:
    """Layer norm over the last axis: [t, h], and with it what was normed, a sum added up: [t, h].

    `reader`: the weight that alone multiplies the norm, which may be rounded as that needs it. With `rms`, the root
    mean square norm, which subtracts no mean; with `unit_offset` its weight is `weight_h` + 1.
    Sources: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang, Sennrich, "Root Mean Square Layer Normalization",
    2019.
    """
    if weight_h.is_cuda:
        from hasten.ops.gpu import norm as kernels

        return kernels.norm(x_th, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset, reader=reader)
    return cpu.norms.norm(x_th, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset)


def norm_alone(
    x_th: Tensor | PartialSum, weight_h: Tensor, bias_h: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    """`norm` where nobody reads what was normed: [t, h]. A sum is not rounded to the type of the weight before."""
    if weight_h.is_cuda:
        from hasten.ops.gpu import norm as kernels

        return kernels.norm_alone(x_th, weight_h, bias_h, eps, rms=rms)
    return cpu.norms.norm(x_th, weight_h, bias_h, eps, rms=rms)[0]


def embedding_norm(ids_t: Tensor, table_vh: Table, weight_h: Tensor, bias_h: Tensor, eps: float) -> Tensor:
    """The layer norm of rows of a table: [t, h]."""
    if table_vh.is_cuda:
        from hasten.ops.gpu import norm as kernels

        assert not isinstance(table_vh, PackedLinear), "a table of a GPU is never packed"
        return kernels.embedding_norm(ids_t, table_vh, weight_h, bias_h, eps)
    return cpu.norms.embedding_norm(ids_t, table_vh, weight_h, bias_h, eps)


def scaled(x_to: Tensor, factor: float) -> Tensor:
    """`x * factor`, in the memory of x."""
    return x_to.mul_(factor) if x_to.is_cuda else cpu.norms.scaled(x_to, factor)
