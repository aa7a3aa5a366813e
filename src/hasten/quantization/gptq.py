"""GPTQ: input features are rounded one after the other, and the remaining ones compensate the error of each.

Shapes: o output features, h input features. Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", 2022.
"""

import torch
from torch import Tensor

from hasten.quantization.grid import Grid, RoundedWeight, nonzero, spread

_BLOCK = 128
"""Input features whose errors reach those behind the block at once."""
_MORE_DAMPENING = 10.0
_MOST_ATTEMPTS = 5


def round_by_gptq(
    weight_oh: Tensor, hessian_hh: Tensor, grid: Grid, dtype: torch.dtype, *, dampening: float = 0.01
) -> RoundedWeight:
    """A weight in fp32 on a grid with scales in `dtype`, for the least error of the layer's outputs.

    `hessian_hh`: the mean of the outer products of the layer's inputs. Its diagonal, whose mean times `dampening` is
    added to it, orders the features: the largest come first. Scales are those of the groups as they are stored, found
    before the first is rounded, so that the order is nothing that who reads the weight must know.
    """
    diagonal_h = hessian_hh.diagonal()
    scales_og = grid.scales(weight_oh, dtype, diagonal_h)
    order_h = diagonal_h.argsort(descending=True, stable=True)
    factor_hh = _inverse_factor(hessian_hh[order_h][:, order_h], dampening)
    size = grid.size(len(order_h))
    steps_oh = spread(nonzero(scales_og.float()), size, len(order_h))[:, order_h]
    numbers_oh = torch.empty_like(weight_oh)
    numbers_oh[:, order_h] = _rounded(weight_oh[:, order_h], steps_oh, factor_hh, grid)
    return RoundedWeight(numbers_oh.to(grid.dtype), scales_og, size)


def _rounded(left_oh: Tensor, steps_oh: Tensor, factor_hh: Tensor, grid: Grid) -> Tensor:
    """Numbers of a weight, which is overwritten, whose features are in order."""
    numbers_oh = torch.empty_like(left_oh)
    for start in range(0, left_oh.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, left_oh.shape[1]))
        left_oc, steps_oc, factor_cc = left_oh[:, block], steps_oh[:, block], factor_hh[block, block]
        errors_oc = torch.empty_like(left_oc)
        for at in range(left_oc.shape[1]):
            numbers_o = grid.nearest(left_oc[:, at] / steps_oc[:, at])
            numbers_oh[:, start + at] = numbers_o
            errors_oc[:, at] = (left_oc[:, at] - numbers_o * steps_oc[:, at]) / factor_cc[at, at]
            left_oc[:, at + 1 :].addr_(errors_oc[:, at], factor_cc[at, at + 1 :], alpha=-1)
        left_oh[:, block.stop :].addmm_(errors_oc, factor_hh[block, block.stop :], alpha=-1)
    return numbers_oh


def _inverse_factor(hessian_hh: Tensor, dampening: float) -> Tensor:
    """The upper Cholesky factor of the inverse, in fp32: row i says how those behind take up the error of feature i.

    Features that no input had count as the mean. Where the matrix is not positive definite, it is dampened more.
    """
    wide_hh = hessian_hh.double()
    diagonal_h = wide_hh.diagonal()
    mean = diagonal_h.mean().clamp(min=torch.finfo(torch.float32).tiny)
    unseen_h = torch.where(diagonal_h == 0, mean, 0.0)
    for _ in range(_MOST_ATTEMPTS):
        dampened_hh = wide_hh + torch.diag(unseen_h + dampening * mean)
        lower_hh, failed = torch.linalg.cholesky_ex(dampened_hh)
        if not failed:
            break
        dampening = _MORE_DAMPENING * max(dampening, 1e-3)
    upper_hh: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower_hh), upper=True)
    return upper_hh.float()
