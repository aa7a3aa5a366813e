"""How functions become kernels: a name each, under which `native/compiled.py` compiles them."""

from collections.abc import Callable
from typing import Any

from numba import njit

from hasten.ops.native.compiled import KINDS, Kind

part = njit(error_model="numpy")
"""A function that kernels call; it raises nothing, as they do not."""

Function = Callable[[Any, Any, Any], None]
"""Of the address of its arguments, the number of a thread and how many threads there are."""
KERNELS: dict[Kind, dict[str, Function]] = {kind: {} for kind in KINDS}
"""By name, of each kind."""
TEAMS: dict[str, Callable[[Any], None]] = {}
"""Functions of the address of a launch."""


def kernel(function: Function) -> None:
    """Let a function be a kernel that every start needs, by its name without the underscore."""
    kernel_of("fp32")(function)


def kernel_of(kind: Kind) -> Callable[[Function], None]:
    """Let a function be a kernel of a kind."""

    def add(function: Function) -> None:
        KERNELS[kind][function.__name__.strip("_")] = function

    return add


def team(function: Callable[[Any], None]) -> None:
    """Let a function run the kernels of a launch."""
    TEAMS[function.__name__.strip("_")] = function
