"""Rows of tables, and norms, on a CPU."""

from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.packed import PackedLinear, QuantizedWeight, Table
from hasten.ops.partial_sum import PartialSum


def embedding(ids_t: Tensor, weight_vh: Table, first: int | None) -> Tensor:
    """Rows in fp32 of tables in bf16 too, as hidden states are (`ops.hidden_dtype`)."""
    if first is not None:
        local_t = ids_t - first
        held_t = (local_t >= 0) & (local_t < weight_vh.shape[0])
        return embedding(local_t.where(held_t, 0), weight_vh, None).masked_fill_(~held_t.unsqueeze(1), 0)
    kernels = native.kernels()
    if isinstance(weight_vh, PackedLinear):
        assert kernels is not None, "who packed it had them"
        assert weight_vh.halves is not None
        return kernels.bf16.gather_from_panels(ids_t.long(), weight_vh.halves, weight_vh.in_features)
    if kernels is not None and ids_t.dtype == torch.int64:
        if isinstance(weight_vh, Tensor) and is_plain(weight_vh):
            return kernels.norms.gather(ids_t, weight_vh)
        if isinstance(weight_vh, Tensor) and weight_vh.dtype == torch.bfloat16 and weight_vh.is_contiguous():
            return kernels.bf16.gather(ids_t, weight_vh)
        if _is_in_bytes(weight_vh):
            return kernels.norms.gather_bytes(ids_t, weight_vh.values, weight_vh.scales)
    if isinstance(weight_vh, QuantizedWeight) and weight_vh.dtype == torch.bfloat16:
        weight_vh = replace(weight_vh, dtype=torch.float32)
    rows_th = reference.embedding(ids_t, weight_vh, None)
    return rows_th.float() if rows_th.dtype == torch.bfloat16 else rows_th


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
    ids_t: Tensor, table_vh: Table, weight_h: Tensor, bias_h: Tensor, eps: float
) -> Tensor:
    kernels = native.kernels()
    if kernels is None or not is_plain(table_vh, weight_h) or ids_t.dtype != torch.int64:
        return norm(embedding(ids_t, table_vh, None), weight_h, bias_h, eps)[0]
    assert isinstance(table_vh, Tensor)
    return kernels.norms.norm(table_vh, weight_h, bias_h, eps, ids_t, rms=False, offset=False)


def _is_in_bytes(table_vh: Table) -> TypeGuard[QuantizedWeight]:
    """Whether it is in int8, of a model whose hidden states are in fp32."""
    return (
        isinstance(table_vh, QuantizedWeight)
        and table_vh.values.dtype == torch.int8
        and table_vh.dtype in (torch.float32, torch.bfloat16)
        and table_vh.values.is_contiguous()
    )


def scaled(x_to: Tensor, factor: float) -> Tensor:  # noqa: D103
    kernels = native.kernels()
    return x_to.mul_(factor) if kernels is None or not is_plain(x_to) else kernels.norms.scale(x_to, factor)


def is_plain(*operands: Table) -> bool:
    """Whether all are tensors in fp32 of at most two axes, row after row."""
    return all(
        isinstance(each, Tensor) and each.dtype == torch.float32 and each.is_contiguous() and each.dim() <= 2
        for each in operands
    )
