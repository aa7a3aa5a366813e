"""Rows of tables, and norms, on a CPU."""

from typing import TypeGuard

import torch
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.packed import QuantizedWeight, Weight
from hasten.ops.partial_sum import PartialSum


def embedding(ids_t: Tensor, weight_vh: Weight, first: int | None) -> Tensor:  # noqa: D103
    kernels = native.kernels()
    if kernels is not None and first is None and ids_t.dtype == torch.int64:
        if isinstance(weight_vh, Tensor) and is_plain(weight_vh):
            return kernels.norms.gather(ids_t, weight_vh)
        if _is_in_bytes(weight_vh):
            return kernels.norms.gather_bytes(ids_t, weight_vh.values, weight_vh.scales)
    return reference.embedding(ids_t, weight_vh, first)


def norm(  # noqa: D103
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    kernels = native.kernels()
    x_th = x_th if isinstance(x_th, Tensor) else reference.complete(x_th).to(weight_h.dtype)
    if kernels is None or not is_plain(x_th, weight_h):
        return reference.norm(x_th, weight_h, bias_h, eps, rms=rms, unit_offset=unit_offset)
    return kernels.norms.norm(x_th, weight_h, bias_h, eps, None, rms=rms, offset=unit_offset), x_th


def embedding_norm(  # noqa: D103
    ids_t: Tensor, table_vh: Weight, weight_h: Tensor, bias_h: Tensor, eps: float
) -> Tensor:
    kernels = native.kernels()
    if kernels is not None and is_plain(weight_h) and _is_in_bytes(table_vh):
        return norm(embedding(ids_t, table_vh, None), weight_h, bias_h, eps)[0]
    if kernels is None or not is_plain(table_vh, weight_h) or ids_t.dtype != torch.int64:
        return reference.embedding_norm(ids_t, table_vh, weight_h, bias_h, eps)
    assert isinstance(table_vh, Tensor)
    return kernels.norms.norm(table_vh, weight_h, bias_h, eps, ids_t, rms=False, offset=False)


def _is_in_bytes(table_vh: Weight) -> TypeGuard[QuantizedWeight]:
    """Whether it is in int8, of a model in fp32."""
    return (
        isinstance(table_vh, QuantizedWeight)
        and table_vh.values.dtype == torch.int8
        and table_vh.dtype == torch.float32
        and table_vh.values.is_contiguous()
    )


def scaled(x_to: Tensor, factor: float) -> Tensor:  # noqa: D103
    kernels = native.kernels()
    return x_to.mul_(factor) if kernels is None or not is_plain(x_to) else kernels.norms.scale(x_to, factor)


def is_plain(*operands: Weight) -> bool:
    """Whether all are tensors in fp32 of at most two axes, row after row."""
    return all(
        isinstance(each, Tensor) and each.dtype == torch.float32 and each.is_contiguous() and each.dim() <= 2
        for each in operands
    )
