"""Inputs of products rounded to 8 bits, with a scale for each token. Shapes: t tokens, h input features.

The definition of what kernels compute, in fp32 throughout, so that every device rounds a value to the same number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Types that inputs are rounded to, and what the largest magnitude of a token becomes."""
BASE = 128
"""A number of two int8 digits is `BASE * high + low`."""
LARGEST_OF_DIGITS = 127.0 * BASE + 63
"""The largest number whose digits are both int8."""


@dataclass(frozen=True)
class RoundedRows:
    """Inputs of a product as the numbers that it multiplies, in place of the tensor [t, h] that was rounded."""

    numbers: Tensor
    """[t, digits * padded h] of 8 bits, as the device's products read them."""
    units_t: Tensor
    """[t] in fp32: what each token's numbers are multiples of."""
    shape: tuple[int, int]
    """(t, h)."""
    dtype: torch.dtype
    """Type that the model computes in."""

    @property
    def is_cuda(self) -> bool:
        """Whether they lie on a GPU."""
        return self.numbers.is_cuda


Inputs = Tensor | RoundedRows
"""What a product is of: [t, h]."""


def divided(x: Tensor, number: float) -> Tensor:
    """`x / number`, rounded once; with a Python number, or a tensor on the host, a GPU multiplies by its inverse."""
    return x / x.new_full((), number)


def units_of(x_th: Tensor, largest: float) -> Tensor:
    """What each token's numbers are multiples of: [t, 1] in fp32; NaN where the token has NaN."""
    return divided(x_th.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny * largest), largest)


def numbers_of(x_th: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values of `dtype` in fp32, [t, h], and their units, [t, 1]: their product is `x_th` rounded."""
    x_th = x_th.float()
    units_t1 = units_of(x_th, LARGEST[dtype])
    numbers_th = x_th * units_t1.reciprocal()
    if dtype == torch.int8:
        return numbers_th.round_(), units_t1
    # a product may be a little above the largest value, which is not a number in some conversions
    return numbers_th.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype).float(), units_t1


def rounded(x_th: Tensor, dtype: torch.dtype) -> Tensor:
    """`x_th` as a product takes it whose inputs are of 8 bits, in at least fp32."""
    numbers_th, units_t1 = numbers_of(x_th, dtype)
    wide = torch.promote_types(x_th.dtype, torch.float32)
    return numbers_th.to(wide) * units_t1.to(wide)


def digits_of(x_th: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """High and low digits, [t, h] each, and units, [t, 1], all in fp32: tokens in 15 bits."""
    units_t1 = units_of(x_th, LARGEST_OF_DIGITS)
    numbers_th = x_th.mul(units_t1.reciprocal()).round_()
    high_th = numbers_th.div(BASE).round_()
    return high_th, numbers_th.sub_(high_th, alpha=BASE), units_t1


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies values of a type of 8 bits; a CPU computes on what they stand for."""
    fp8 = dtype == torch.float8_e4m3fn
    return not (fp8 and device.type == "cuda") or torch.cuda.get_device_capability(device) >= (8, 9)
