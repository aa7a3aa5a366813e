"""What kernels do with AMX's tiles: eight registers of each thread, of up to 16 rows of 64 bytes."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hasten.ops.native.code.simd import I8, called


def tile(number: int) -> ir.Constant:
    """A tile, as instructions name it."""
    return ir.Constant(I8, number)


def moved(b: Any, name: str, number: int, address: Any, stride: Any) -> None:
    """Load or store a tile, by the name of the instruction, with `stride` bytes from row to row in memory."""
    called(b, f"llvm.x86.{name}", ir.VoidType(), [tile(number), _pointer(b, address), stride])


def _pointer(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I8.as_pointer())


@intrinsic
def configure(_context, form):
    """Give the tiles of this thread the sizes that stand at an address."""

    def code(context, b, _signature, args):
        called(b, "llvm.x86.ldtilecfg", ir.VoidType(), [_pointer(b, args[0])])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def release(_context):
    """Let the tiles of this thread go."""

    def code(context, b, _signature, _args):
        called(b, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), code
