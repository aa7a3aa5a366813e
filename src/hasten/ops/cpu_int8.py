"""Products with int8 weights on a CPU. Shapes: t tokens, h input features, o output features.

Where the CPU adds products of int8 up exactly, activations become whole numbers too: each token's values are rounded
to multiples of 1/16319 of its largest, and such a number is two int8 digits. That is finer than fp16 (docs/
performance.md), a token's result does not depend on its neighbours, and int8 products are up to twice as fast as fp32.
"""

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.compiled_rows import compiled_rows
from hasten.ops.packed import PackedLinear, QuantizedWeight

_BASE = 128
"""A number is `_BASE * high + low`."""
_LARGEST = 127 * _BASE + 63
"""The largest number whose digits are both int8."""
_ROWS = 512
"""Most tokens of one product: bounds the memory of the sums of both digits."""
_FEATURES = 256
"""Output features that are widened to fp32 at a time: few enough to be in the cache when they are multiplied."""


def pack_linear(weight_oh: QuantizedWeight, shared: bool) -> PackedLinear:
    """Output features innermost, which oneDNN reads fastest; a shared weight as it is."""
    values = weight_oh.values if shared else weight_oh.values.t().contiguous().t()
    return PackedLinear(*weight_oh.shape, plain=values, scales=weight_oh.scales)


def product(x_th: Tensor, weight: PackedLinear, scales_o: Tensor) -> Tensor:
    """`x @ (values * scales).T` of fp32: [t, o]."""
    assert weight.plain is not None
    if not exact_int8() or weight.in_features == 1:  # a matrix of width 1 has no strides to tell its order by
        return _widened(x_th, weight.plain).mul_(scales_o)
    pieces = [_by_digits(piece, weight.plain, scales_o) for piece in x_th.split(_ROWS)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@cache
def exact_int8() -> bool:
    """Whether products of int8 are added up without saturating here: CPUs without VNNI add pairs of them in int16."""
    if not torch.backends.mkldnn.is_available():
        return False
    largest = torch.full((2, 64), 127, dtype=torch.int8)
    return int(torch._int_mm(largest, largest.t()).min()) == 127 * 127 * 64


def _by_digits(x_th: Tensor, values_oh: Tensor, scales_o: Tensor) -> Tensor:
    """One product of all high digits and all low ones."""
    rows = x_th.shape[0]
    unit_t1 = x_th.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny * _LARGEST).div_(_LARGEST)
    numbers_th = x_th.div(unit_t1).round_()
    high_th = numbers_th.div(_BASE).round_()
    digits = torch.zeros(compiled_rows(2 * rows), x_th.shape[1], dtype=torch.int8)
    digits[:rows] = high_th
    digits[rows : 2 * rows] = numbers_th.sub_(high_th, alpha=_BASE)
    sums = torch._int_mm(digits, values_oh.t())
    # NaN and infinity are in the unit, and come back with it
    return sums[:rows].float().mul_(_BASE).add_(sums[rows : 2 * rows]).mul_(unit_t1).mul_(scales_o)


def _widened(x_th: Tensor, values_oh: Tensor) -> Tensor:
    """The product with values in fp32, a block of output features at a time."""
    return torch.cat([F.linear(x_th, block.float()) for block in values_oh.split(_FEATURES)], dim=1)
