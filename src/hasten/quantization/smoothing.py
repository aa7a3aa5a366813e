"""Scales of input features that move between a norm and the linear layers that read it, for less rounding error.

A norm's output feature is divided by its scale, and the weights of that input feature are multiplied by it: the model
computes the same. Shapes: t tokens, o output features, h input features. Sources: Lin et al., "AWQ: Activation-aware
Weight Quantization", 2023 (by mean magnitudes, for weights); Xiao et al., "SmoothQuant", 2022 (by largest magnitudes,
for weights and activations).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.ops.rounding import rounded
from hasten.quantization.grid import Grid

_STEPS = 20
_LEAST = 1e-5
"""Magnitudes of a feature, relative to the largest, below which it is scaled no further."""


@dataclass(frozen=True)
class Inputs:
    """What linear layers behind one norm were seen to read."""

    mean_h: Tensor
    """Mean magnitude of each feature, in fp32."""
    largest_h: Tensor
    rows_th: Tensor
    """Some of the tokens, in fp32."""


def smoothing_scales(
    weights: Sequence[Tensor], inputs: Inputs, grid: Grid, rounds_to: torch.dtype | None
) -> Tensor | None:
    """Scales [h] for the least error of the outputs of layers with these weights [o, h], in fp32; None: the best is 1.

    `rounds_to`: the type that inputs are rounded to, each token with a scale of its own.
    """
    weight_oh = torch.cat(tuple(weights))
    right_to = inputs.rows_th @ weight_oh.t()
    best, least = None, _error(weight_oh, inputs.rows_th, right_to, grid, rounds_to)
    for scales_h in _candidates(weight_oh, inputs, rounds_to):
        error = _error(weight_oh * scales_h, inputs.rows_th / scales_h, right_to, grid, rounds_to)
        if error < least:
            best, least = scales_h, error
    return best


def _candidates(weight_oh: Tensor, inputs: Inputs, rounds_to: torch.dtype | None) -> Iterator[Tensor]:
    """Scales from the magnitudes of inputs alone to those of weights alone."""
    of_inputs = inputs.mean_h if rounds_to is None else inputs.largest_h
    of_weights = weight_oh.abs().amax(0)
    of_inputs, of_weights = (each.clamp(min=_LEAST * float(each.max())) for each in (of_inputs, of_weights))
    if not bool(of_inputs.isfinite().all()) or float(of_inputs.max()) == 0 or float(of_weights.max()) == 0:
        return
    for step in range(1, _STEPS + 1):
        strength = step / _STEPS
        yield _centered(of_inputs.pow(strength) / of_weights.pow(1 - strength))
        yield _centered(of_inputs.pow(strength))


def _centered(scales_h: Tensor) -> Tensor:
    """Scales whose smallest and largest are inverse to each other: numbers keep their range."""
    return scales_h / (scales_h.min() * scales_h.max()).sqrt()


def _error(weight_oh: Tensor, rows_th: Tensor, right_to: Tensor, grid: Grid, rounds_to: torch.dtype | None) -> float:
    found_oh = grid.rounded(weight_oh, grid.scales(weight_oh, torch.float32)).dequantized()
    rows_th = rows_th if rounds_to is None else rounded(rows_th, rounds_to)
    return float((rows_th @ found_oh.t() - right_to).square().sum())


def moved(weight_h: Tensor, bias_h: Tensor | None, scales_h: Tensor, offset: float) -> "Moved":
    """A norm's weight and bias divided by scales, in their types, and the scales that its rounded weight really has.

    `offset`: what the norm adds to its weight. The weights behind it take just what is taken from it.
    """
    wide_h = weight_h.float() + offset
    new_h = (wide_h / scales_h - offset).to(weight_h.dtype)
    effective_h = new_h.float() + offset
    usable_h = (wide_h != 0) & (effective_h != 0) & effective_h.isfinite()
    new_h = torch.where(usable_h, new_h, weight_h)
    real_h = torch.where(usable_h, wide_h / effective_h, 1.0)
    new_bias_h = None if bias_h is None else (bias_h.float() / real_h).to(bias_h.dtype)
    return Moved(new_h, new_bias_h, real_h)


@dataclass(frozen=True)
class Moved:
    """A norm whose outputs are divided by scales."""

    weight_h: Tensor
    bias_h: Tensor | None
    scales_h: Tensor
    """[h] in fp32: what the weights behind it are to be multiplied by."""
