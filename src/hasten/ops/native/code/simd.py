"""Vectors of 16 numbers, memory by its address, and calls by address, in functions that numba compiles.

numba vectorizes few loops whose operands may overlap; these intrinsics say what is to be computed side by side. LLVM
maps a vector to whatever registers the processor has. An address is an int64 that counts bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16
BYTES = 4 * LANES

F32, F64, I32, I64, I8 = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(64), ir.IntType(8)
VECTOR = ir.VectorType(F32, LANES)
WHOLE = ir.VectorType(I32, LANES)

_LANE_NUMBERS = ir.Constant(VECTOR, [float(lane) for lane in range(LANES)])

Builder = Any
Values = Sequence[Any]


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__("float32x16")


class _WholeVector(types.Type):
    def __init__(self) -> None:
        super().__init__("int32x16")


vector, whole_vector = _Vector(), _WholeVector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, of) -> None:
        super().__init__(manager, of, VECTOR)


@register_model(_WholeVector)
class _WholeVectorModel(models.PrimitiveModel):
    def __init__(self, manager, of) -> None:
        super().__init__(manager, of, WHOLE)


def constant(value: float) -> ir.Constant:
    """A vector with the same number in all lanes."""
    return ir.Constant(VECTOR, [value] * LANES)


def called(b: Builder, name: str, result: ir.Type, args: Values, **options: Any) -> Any:
    """A call of one of LLVM's own functions."""
    kinds = [each.type for each in args]
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, kinds), name)
    return b.call(function, args, **options)


def fused(b: Builder, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z`, rounded once."""
    return called(b, "llvm.fma.v16f32", VECTOR, [x, y, z])


def spread(b: Builder, x: Any) -> Any:
    """A vector with one number in all lanes, in fp32 or int32."""
    nothing = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    first = b.insert_element(nothing, x, ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(WHOLE, [0] * LANES))


def read(b: Builder, kind: ir.Type, address: Any) -> Any:
    """What stands at an address, which is a multiple of 4."""
    loaded = b.load(b.inttoptr(address, kind.as_pointer()))
    loaded.align = 4
    return loaded


def write(b: Builder, value: Any, address: Any) -> None:
    """Put a value at an address, which is a multiple of 4."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


def intrinsic_of(
    arguments: Sequence[types.Type], result: types.Type, generate: Callable[[Builder, Values], Any]
) -> Any:
    """An intrinsic of up to three arguments, whose LLVM code `generate` writes."""

    def typed(_context, *given):
        def code(context, b, _signature, args):
            result = generate(b, args)
            return context.get_dummy_value() if result is None else result

        return result(*arguments), code

    if len(arguments) == 1:
        return intrinsic(lambda context, x: typed(context, x))
    if len(arguments) == 2:
        return intrinsic(lambda context, x, y: typed(context, x, y))
    return intrinsic(lambda context, x, y, z: typed(context, x, y, z))


def _exp(b: Builder, x: Any) -> Any:
    """By 2^n * e^r with r within half of log 2, to an error of 2e-7 of the value; NaN stays NaN.

    Source of the polynomial: Moshier, "Cephes Mathematical Library", 1989 (expf).
    """
    x = b.select(b.fcmp_ordered("<", x, constant(-87.0)), constant(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, constant(88.0)), constant(88.0), x)
    whole = called(b, "llvm.nearbyint.v16f32", VECTOR, [b.fmul(x, constant(1.44269504))])
    # log 2 in two parts, of which the first times `whole` is exact
    rest = fused(b, whole, constant(2.12194440e-4), fused(b, whole, constant(-0.693359375), x))
    power = constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        power = fused(b, power, rest, constant(factor))
    power = b.fadd(fused(b, power, b.fmul(rest, rest), rest), constant(1.0))
    bias, shift = (ir.Constant(WHOLE, [number] * LANES) for number in (127, 23))
    return b.fmul(power, b.bitcast(b.shl(b.add(b.fptosi(whole, WHOLE), bias), shift), VECTOR))


def _larger(b: Builder, args: Values) -> Any:
    return b.select(b.fcmp_ordered(">", *args), *args)


def _largest_or_nan(b: Builder, args: Values) -> Any:
    x, y = args
    greater = b.select(b.fcmp_ordered(">", y, x), y, x)
    return b.select(b.fcmp_unordered("uno", y, y), y, greater)


def _clamped(b: Builder, args: Values) -> Any:
    x, limit = args
    below = b.fsub(constant(-0.0), limit)
    x = b.select(b.fcmp_ordered("<", x, limit), x, limit)
    return b.select(b.fcmp_ordered(">", x, below), x, below)


def _counted(relation: str) -> Callable[[Builder, Values], Any]:
    def generate(b: Builder, args: Values) -> Any:
        bits = b.bitcast(b.fcmp_ordered(relation, *args), ir.IntType(LANES))
        return b.zext(called(b, "llvm.ctpop.i16", ir.IntType(LANES), [bits]), I64)

    return generate


def prefetched(b: Builder, args: Values, level: int = 1, *, writes: bool = False) -> None:
    """Fetch the cache line of an address, to this level of the caches; or, to the first, for what `writes` it."""
    pointer, numbers = b.inttoptr(args[0], I8.as_pointer()), (int(writes), 4 - level, 1)
    called(b, "llvm.prefetch.p0", ir.VoidType(), [pointer, *(ir.Constant(I32, each) for each in numbers)])


_two = (vector, vector)
load = intrinsic_of((types.int64,), vector, lambda b, args: read(b, VECTOR, args[0]))
store = intrinsic_of((types.int64, vector), types.void, lambda b, args: write(b, args[1], args[0]))
splat = intrinsic_of((types.float32,), vector, lambda b, args: spread(b, args[0]))
fma = intrinsic_of((vector, *_two), vector, lambda b, args: fused(b, *args))
add = intrinsic_of(_two, vector, lambda b, args: b.fadd(*args))
sub = intrinsic_of(_two, vector, lambda b, args: b.fsub(*args))
mul = intrinsic_of(_two, vector, lambda b, args: b.fmul(*args))
div = intrinsic_of(_two, vector, lambda b, args: b.fdiv(*args))
larger = intrinsic_of(_two, vector, _larger)
"""The greater of each two numbers; the second where either is NaN."""
larger_or_nan = intrinsic_of(_two, vector, _largest_or_nan)
"""The greater of each two numbers; NaN where either is."""
signed = intrinsic_of(_two, vector, lambda b, args: called(b, "llvm.copysign.v16f32", VECTOR, args))
"""The absolute value of each first number with the sign of the second."""
exp = intrinsic_of((vector,), vector, lambda b, args: _exp(b, args[0]))
total = intrinsic_of(
    (vector,),
    types.float32,
    lambda b, args: called(
        b, "llvm.vector.reduce.fadd.v16f32", F32, [ir.Constant(F32, -0.0), args[0]], fastmath=("reassoc",)
    ),
)
largest = intrinsic_of(
    (vector,), types.float32, lambda b, args: called(b, "llvm.vector.reduce.fmax.v16f32", F32, [args[0]])
)
count_greater = intrinsic_of(_two, types.int64, _counted(">"))
"""How many numbers are greater than the others."""
count_equal = intrinsic_of(_two, types.int64, _counted("=="))
"""How many numbers are equal to the others."""
lanes = intrinsic(lambda _context: (vector(), lambda _context, _b, _signature, _args: _LANE_NUMBERS))
"""The numbers 0 to 15."""
first_lane = intrinsic_of((vector,), types.float32, lambda b, args: b.extract_element(args[0], ir.Constant(I32, 0)))
prefetch = intrinsic_of((types.int64,), types.void, prefetched)
prefetch_second = intrinsic_of((types.int64,), types.void, lambda b, args: prefetched(b, args, level=2))
"""To the second-level cache."""
clamped = intrinsic_of(_two, vector, _clamped)
"""Numbers from -limit to limit; NaN becomes the limit."""
nearest = intrinsic_of((vector,), vector, lambda b, args: called(b, "llvm.nearbyint.v16f32", VECTOR, args))
"""Whole numbers, even ones of two as near."""
magnitude = intrinsic_of((vector,), vector, lambda b, args: called(b, "llvm.fabs.v16f32", VECTOR, args))

_BYTES = ir.VectorType(I8, LANES)
_whole_two = (whole_vector, whole_vector)
load_whole = intrinsic_of((types.int64,), whole_vector, lambda b, args: read(b, WHOLE, args[0]))
store_whole = intrinsic_of((types.int64, whole_vector), types.void, lambda b, args: write(b, args[1], args[0]))
splat_whole = intrinsic_of((types.int32,), whole_vector, lambda b, args: spread(b, args[0]))
add_whole = intrinsic_of(_whole_two, whole_vector, lambda b, args: b.add(*args))
sub_whole = intrinsic_of(_whole_two, whole_vector, lambda b, args: b.sub(*args))
mul_whole = intrinsic_of(_whole_two, whole_vector, lambda b, args: b.mul(*args))
total_whole = intrinsic_of(
    (whole_vector,), types.int32, lambda b, args: called(b, "llvm.vector.reduce.add.v16i32", I32, args)
)
widened = intrinsic_of((whole_vector,), vector, lambda b, args: b.sitofp(args[0], VECTOR))
"""Whole numbers in fp32."""
narrowed = intrinsic_of((vector,), whole_vector, lambda b, args: b.fptosi(args[0], WHOLE))
"""The inverse."""
load_bytes = intrinsic_of((types.int64,), whole_vector, lambda b, args: b.sext(read(b, _BYTES, args[0]), WHOLE))
"""16 numbers of int8."""
store_bytes = intrinsic_of(
    (types.int64, whole_vector), types.void, lambda b, args: write(b, b.trunc(args[1], _BYTES), args[0])
)
"""Whole numbers as int8, which has room for them."""

load_f32 = intrinsic_of((types.int64,), types.float32, lambda b, args: read(b, F32, args[0]))
store_f32 = intrinsic_of((types.int64, types.float32), types.void, lambda b, args: write(b, args[1], args[0]))
load_i8 = intrinsic_of((types.int64,), types.int8, lambda b, args: read(b, I8, args[0]))
load_i32 = intrinsic_of((types.int64,), types.int32, lambda b, args: read(b, I32, args[0]))
store_i32 = intrinsic_of((types.int64, types.int32), types.void, lambda b, args: write(b, args[1], args[0]))
load_i64 = intrinsic_of((types.int64,), types.int64, lambda b, args: read(b, I64, args[0]))
load_f64 = intrinsic_of((types.int64,), types.float64, lambda b, args: read(b, F64, args[0]))
store_i64 = intrinsic_of((types.int64, types.int64), types.void, lambda b, args: write(b, args[1], args[0]))

_I16 = ir.IntType(16)
_HALVES = ir.VectorType(_I16, LANES)


def _widened_halves(b: Builder, args: Values) -> Any:
    bits = b.zext(read_halves(b, _HALVES, args[0]), WHOLE)
    return b.bitcast(b.shl(bits, ir.Constant(WHOLE, [16] * LANES)), VECTOR)


def read_halves(b: Builder, kind: ir.Type, address: Any) -> Any:
    """What stands at an address, which is a multiple of 2."""
    loaded = b.load(b.inttoptr(address, kind.as_pointer()))
    loaded.align = 2
    return loaded


def _rounded_halves(b: Builder, args: Values) -> None:
    address, x = args
    bits, sixteen = b.bitcast(x, WHOLE), ir.Constant(WHOLE, [16] * LANES)
    odd = b.and_(b.lshr(bits, sixteen), ir.Constant(WHOLE, [1] * LANES))
    nearest = b.lshr(b.add(b.add(bits, ir.Constant(WHOLE, [0x7FFF] * LANES)), odd), sixteen)
    # of NaN all bits that count may be among those that are lost
    quiet = b.or_(b.lshr(bits, sixteen), ir.Constant(WHOLE, [0x40] * LANES))
    rounded = b.select(b.fcmp_unordered("uno", x, x), quiet, nearest)
    b.store(b.trunc(rounded, _HALVES), b.inttoptr(address, _HALVES.as_pointer())).align = 2


load_halves = intrinsic_of((types.int64,), vector, _widened_halves)
"""16 numbers of bf16."""
store_halves = intrinsic_of((types.int64, vector), types.void, _rounded_halves)
"""Numbers rounded to bf16, to even ones of two as near."""
load_half = intrinsic_of(
    (types.int64,),
    types.float32,
    lambda b, args: b.bitcast(b.shl(b.zext(read_halves(b, _I16, args[0]), I32), ir.Constant(I32, 16)), F32),
)
"""A number of bf16."""


def _transpose(_context, source, stride, target, apart):
    """Write a square of 16 numbers in each of 16 rows, `stride` bytes apart, with rows and columns exchanged.

    The rows of the result are `apart` bytes apart.
    """

    def code(context, b, _signature, args):
        source, stride, target, apart = args
        rows = [read(b, VECTOR, b.add(source, b.mul(stride, ir.Constant(I64, row)))) for row in range(LANES)]
        half = LANES
        while half > 1:
            half //= 2
            # of each pair of rows `half` apart, squares of that size outside the diagonal change places
            low = [lane if lane & half == 0 else LANES + lane - half for lane in range(LANES)]
            high = [lane + half if lane & half == 0 else LANES + lane for lane in range(LANES)]
            for first in (row for row in range(LANES) if row & half == 0):
                near, far = rows[first], rows[first + half]
                rows[first] = b.shuffle_vector(near, far, ir.Constant(WHOLE, low))
                rows[first + half] = b.shuffle_vector(near, far, ir.Constant(WHOLE, high))
        for number, row in enumerate(rows):
            write(b, row, b.add(target, b.mul(apart, ir.Constant(I64, number))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


transpose = intrinsic(_transpose)


def stack(size: int) -> Any:
    """A function that gives the address of so many bytes on the stack of its caller, a multiple of 64."""

    def code(_context, b, _signature, _args):
        with b.goto_entry_block():
            memory = b.alloca(ir.ArrayType(I8, size))
            memory.align = 64
        return b.ptrtoint(memory, I64)

    return intrinsic(lambda _context: (types.int64(), code))


@intrinsic
def call(_context, function, data, thread, threads):
    """Call a kernel by its address."""

    def code(context, b, _signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


@intrinsic
def call_number(_context, function):
    """Call a function without arguments that gives a C int, by its address."""

    def code(_context, b, _signature, args):
        return b.call(b.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer()), [])

    return types.int32(types.int64), code


@intrinsic
def wait(_context, function):
    """Call a function without arguments and without a result, by its address."""

    def code(context, b, _signature, args):
        b.call(b.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), code
