"""Rounding to types of 8 bits, as `ops/rounding.py` and `ops/cache_scales.py` define it."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def whole(x):
    """fp32 below 2^22 rounded to the nearest whole number, the even one of two."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_e4m3(x):
    """fp32 in e4m3, rounded to the nearest; its largest number for what is beyond it, and NaN for NaN."""
    if _INTERPRETED:
        # the interpreter cuts off instead, so it is given nothing to round
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)  # that of the least normal one
        large = (exponent - (3 << 23)).to(tl.float32, bitcast=True) * 12582912.0
        x = (x + large) - large
    return x.to(tl.float8e4nv)


@triton.jit
def in_cache(value, inverse, dtype: tl.constexpr):
    """Values of the model's type as a cache of 8 bits holds them."""
    number = value.to(tl.float32) * inverse
    if dtype == tl.int8:
        return whole(tl.clamp(number, -127.0, 127.0)).to(tl.int8)
    else:
        return to_e4m3(number)
