"""Vectors of 8 fp64 numbers, for what must not be rounded to fp32: see `simd.py`."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import register_model

from hasten.ops.native.code.simd import F32, F64, I32, I64, Builder, Values, called, intrinsic_of, read, write

LANES = 8
BYTES = 8 * LANES

_VECTOR = ir.VectorType(F64, LANES)
_WHOLE = ir.VectorType(I64, LANES)
_LEAST = -708.0
"""Powers of e below this one are below the least normal number."""
_FACTORIALS = (
    6227020800.0,
    479001600.0,
    39916800.0,
    3628800.0,
    362880.0,
    40320.0,
    5040.0,
    720.0,
    120.0,
    24.0,
    6.0,
    2.0,
    1.0,
    1.0,
)


class _Wide(types.Type):
    def __init__(self) -> None:
        super().__init__("float64x8")


wide = _Wide()


@register_model(_Wide)
class _WideModel(models.PrimitiveModel):
    def __init__(self, manager, of) -> None:
        super().__init__(manager, of, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


def _spread(b: Builder, args: Values) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    first = b.insert_element(nothing, args[0], ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def _fused(b: Builder, x: Any, y: Any, z: Any) -> Any:
    return called(b, "llvm.fma.v8f64", _VECTOR, [x, y, z])


def _exp(b: Builder, args: Values) -> Any:
    """By 2^n * e^r with r within half of log 2, and the series of e^r: to about a unit of the last place.

    Of numbers up to 0; what would be below the least normal number is 0.
    """
    (x,) = args
    bounded = b.select(b.fcmp_ordered("<", x, _constant(_LEAST)), _constant(_LEAST), x)
    power_of_two = called(b, "llvm.nearbyint.v8f64", _VECTOR, [b.fmul(bounded, _constant(1.4426950408889634))])
    # log 2 in two parts, of which the first times a small whole number is exact
    rest = _fused(b, power_of_two, _constant(-6.93147180369123816490e-01), bounded)
    rest = _fused(b, power_of_two, _constant(-1.90821492927058770002e-10), rest)
    series = _constant(1 / _FACTORIALS[0])
    for factorial in _FACTORIALS[1:]:
        series = _fused(b, series, rest, _constant(1 / factorial))
    bias, shift = (ir.Constant(_WHOLE, [number] * LANES) for number in (1023, 52))
    bits = b.shl(b.add(b.fptosi(power_of_two, _WHOLE), bias), shift)
    return b.select(b.fcmp_ordered("<", x, _constant(_LEAST)), _constant(0.0), b.fmul(series, b.bitcast(bits, _VECTOR)))


def _kept(b: Builder, args: Values) -> Any:
    return b.select(b.fcmp_ordered(">=", *args), args[0], _constant(0.0))


def _where(b: Builder, args: Values) -> Any:
    bits = b.bitcast(b.fcmp_ordered(">=", *args), ir.IntType(LANES))
    return b.zext(bits, I64)


def _larger(b: Builder, args: Values) -> Any:
    return b.select(b.fcmp_ordered(">", *args), *args)


def _smaller(b: Builder, args: Values) -> Any:
    return b.select(b.fcmp_ordered("<", *args), *args)


def _kept_or(b: Builder, args: Values) -> Any:
    values, borders, other = args
    return b.select(b.fcmp_ordered(">=", values, borders), values, _spread(b, [other]))


def _counted(b: Builder, args: Values) -> Any:
    return b.select(b.fcmp_ordered(">=", *args), _constant(1.0), _constant(0.0))


def _total(b: Builder, args: Values) -> Any:
    zero = ir.Constant(F64, -0.0)
    return called(b, "llvm.vector.reduce.fadd.v8f64", F64, [zero, args[0]], fastmath=("reassoc",))


_two = (wide, wide)
load = intrinsic_of((types.int64,), wide, lambda b, args: read(b, _VECTOR, args[0]))
store = intrinsic_of((types.int64, wide), types.void, lambda b, args: write(b, args[1], args[0]))
widened = intrinsic_of(
    (types.int64,), wide, lambda b, args: b.fpext(read(b, ir.VectorType(F32, LANES), args[0]), _VECTOR)
)
"""Eight fp32 numbers in memory, in fp64."""
splat = intrinsic_of((types.float64,), wide, _spread)
add = intrinsic_of(_two, wide, lambda b, args: b.fadd(*args))
sub = intrinsic_of(_two, wide, lambda b, args: b.fsub(*args))
div = intrinsic_of(_two, wide, lambda b, args: b.fdiv(*args))
larger = intrinsic_of(_two, wide, _larger)
exp = intrinsic_of((wide,), wide, _exp)
kept = intrinsic_of(_two, wide, _kept)
"""The numbers that are at least as great as the others; 0 for those that are not."""
where = intrinsic_of(_two, types.int64, _where)
"""A bit for each number that is at least as great as the other, the first lane's the lowest."""
kept_or = intrinsic_of((*_two, types.float64), wide, _kept_or)
"""The numbers that are at least as great as the others; a third in place of those that are not."""
counted = intrinsic_of(_two, wide, _counted)
"""1 for numbers that are at least as great as the others; 0 for those that are not."""
smaller = intrinsic_of(_two, wide, _smaller)
least = intrinsic_of((wide,), types.float64, lambda b, args: called(b, "llvm.vector.reduce.fmin.v8f64", F64, [args[0]]))
most = intrinsic_of((wide,), types.float64, lambda b, args: called(b, "llvm.vector.reduce.fmax.v8f64", F64, [args[0]]))
bits = intrinsic_of((types.float64,), types.int64, lambda b, args: b.bitcast(args[0], I64))
from_bits = intrinsic_of((types.int64,), types.float64, lambda b, args: b.bitcast(args[0], F64))
total = intrinsic_of((wide,), types.float64, _total)
store_f64 = intrinsic_of((types.int64, types.float64), types.void, lambda b, args: write(b, args[1], args[0]))
