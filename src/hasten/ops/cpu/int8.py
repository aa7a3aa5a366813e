"""Products with int8 weights on a CPU. Shapes: t tokens, h input features, o output features.

The kernels of `native/integers.py` multiply where they can. Where the CPU adds products of int8 up exactly, inputs
become whole numbers. Where the scheme rounds them to int8, they
are one such number; else each token's values are rounded to multiples of 1/16319 of its largest, and such a number is
two int8 digits. That is finer than fp16 (docs/performance-log.md). A token's result does not depend on its neighbours.
"""

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops import native
from hasten.ops.cpu.compiled_rows import compiled_rows
from hasten.ops.packed import PackedLinear, QuantizedWeight
from hasten.ops.rounding import BASE, digits_of, numbers_of, rounded

_PACK_FOR_ROWS = 16
"""Batch size that oneDNN lays a weight out for; the layout serves other sizes as well."""
_ROWS = 512
"""Most tokens of one product: bounds the memory of the sums of both digits."""
_FEATURES = 256
"""Output features that are widened to fp32 at a time: few enough to be in the cache when they are multiplied."""
_ZERO = 128
"""What is added to int8 inputs: oneDNN has fast code for uint8 ones alone."""


def pack_linear(weight_oh: QuantizedWeight) -> PackedLinear:
    """In the kernels' layout, or oneDNN's, which it reads up to three times as fast as rows."""
    shape, scales, inputs = weight_oh.shape, weight_oh.scales, weight_oh.inputs
    kernels = native.integer_kernels()
    if kernels is not None and kernels.fits(shape[1], shape[1]):
        values_oh = weight_oh.values.view(torch.uint8) ^ _ZERO
        digits = 2 if inputs is None else 1
        panels = kernels.pack(values_oh, scales.unsqueeze(0), None, bits=8, digits=digits)
        return PackedLinear(*shape, plain=None, integers=panels)
    if not exact_int8():
        return PackedLinear(*shape, plain=weight_oh.values, scales=scales, inputs=inputs)
    blocked = torch.ops.onednn.qlinear_prepack(weight_oh.values, [_PACK_FOR_ROWS, shape[1]])
    return PackedLinear(*shape, plain=None, blocked=blocked, scales=scales, inputs=inputs)


def product(x_th: Tensor, weight: PackedLinear, scales_o: Tensor) -> Tensor:
    """`x @ (values * scales).T` of fp32: [t, o]."""
    if weight.blocked is None:
        assert weight.plain is not None
        x_th = x_th if weight.inputs is None else rounded(x_th, weight.inputs)
        return _widened(x_th, weight.plain).mul_(scales_o)
    by = _by_digits if weight.inputs is None else _by_numbers
    if x_th.shape[0] <= _ROWS:
        sums_to, units_t1 = by(x_th, weight.blocked, scales_o)
        return sums_to.mul_(units_t1)
    out_to = x_th.new_empty(x_th.shape[0], weight.out_features)
    for piece, target in zip(x_th.split(_ROWS), out_to.split(_ROWS), strict=True):
        torch.mul(*by(piece, weight.blocked, scales_o), out=target)
    return out_to


@cache
def exact_int8() -> bool:
    """Whether products of int8 are added up without saturating here: CPUs without VNNI add pairs of them in int16."""
    if not torch.backends.mkldnn.is_available():
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    blocked = torch.ops.onednn.qlinear_prepack(largest, [2, 64])
    return int(_products(torch.full((2, 64), 127.0), blocked, torch.ones(64)).min()) == 127 * 127 * 64


def _by_digits(x_th: Tensor, blocked: Tensor, scales_o: Tensor) -> tuple[Tensor, Tensor]:
    """One product of all high digits and all low ones; and the units."""
    rows = x_th.shape[0]
    high_th, low_th, units_t1 = digits_of(x_th)
    sums = _products(torch.cat((high_th, low_th)), blocked, scales_o)
    # NaN and infinity are in the unit, and come back with it
    return sums[:rows].mul_(BASE).add_(sums[rows:]), units_t1


def _by_numbers(x_th: Tensor, blocked: Tensor, scales_o: Tensor) -> tuple[Tensor, Tensor]:
    """The product of single numbers; and the units."""
    numbers_th, units_t1 = numbers_of(x_th, torch.int8)
    return _products(numbers_th, blocked, scales_o), units_t1


def _products(numbers_th: Tensor, blocked: Tensor, scales_o: Tensor) -> Tensor:
    """Of whole numbers from -127 to 127 in fp32, which are overwritten: [t, o] in fp32."""
    rows, width = numbers_th.shape
    inputs_th = torch.zeros(compiled_rows(rows), width, dtype=torch.uint8)
    inputs_th[:rows] = numbers_th.add_(_ZERO)
    zero = torch.zeros(1, dtype=torch.int32)  # of the weight
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(
        inputs_th, 1.0, _ZERO, blocked, scales_o, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return sums[:rows]


def _widened(x_th: Tensor, values_oh: Tensor) -> Tensor:
    """The product with values in fp32, a block of output features at a time."""
    return torch.cat([F.linear(x_th, block.float()) for block in values_oh.split(_FEATURES)], dim=1)
