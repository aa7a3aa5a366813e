"""Rows of tables, norms, and sums added up."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.packed import QuantizedWeight, Weight
from hasten.ops.partial_sum import PartialSum


def embedding(ids_t: Tensor, weight_vh: Weight, first: int | None) -> Tensor:  # noqa: D103
    if first is None:
        return _rows(ids_t, weight_vh)
    local_t = ids_t - first
    held_t = (local_t >= 0) & (local_t < weight_vh.shape[0])
    rows_th = _rows(local_t.where(held_t, 0), weight_vh)
    return rows_th.masked_fill_(~held_t.unsqueeze(1), 0)


def _rows(ids_t: Tensor, weight_vh: Weight) -> Tensor:
    if isinstance(weight_vh, Tensor):
        return F.embedding(ids_t, weight_vh)
    assert isinstance(weight_vh, QuantizedWeight)  # tables have scales of rows
    return (weight_vh.values[ids_t] * weight_vh.scales[ids_t].unsqueeze(1)).to(weight_vh.dtype)


def norm(  # noqa: D103
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    bias_h: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    x_th = x_th if isinstance(x_th, Tensor) else complete(x_th).to(weight_h.dtype)
    if not rms:
        return F.layer_norm(x_th, weight_h.shape, weight_h, bias_h, eps), x_th
    normed_th = rms_norm(wide(x_th), weight_h, eps, unit_offset)
    return (normed_th if bias_h is None else normed_th + bias_h).to(x_th.dtype), x_th


def wide(x: Tensor) -> Tensor:
    """The values in fp32, or in fp64 where they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """The root mean square norm, with the weight itself or that + 1."""
    weight = wide(weight) + 1 if unit_offset else weight
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def complete(sum_: PartialSum) -> Tensor:
    """A sum added up, in the widest type of its terms; those of other ranks must be in it already."""
    assert not sum_.over_ranks
    total_th = sum_.product()
    for bias_h in (sum_.bias, sum_.added_bias):
        total_th = total_th if bias_h is None else total_th + bias_h
    if sum_.residual is not None:
        total_th = total_th + (sum_.residual if sum_.residual_indices is None else sum_.residual[sum_.residual_indices])
    return total_th


def embedding_norm(  # noqa: D103
    ids_t: Tensor, table_vh: Weight, weight_h: Tensor, bias_h: Tensor, eps: float
) -> Tensor:
    return F.layer_norm(_rows(ids_t, table_vh), weight_h.shape, weight_h, bias_h, eps)
