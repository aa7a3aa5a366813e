"""How functions become kernels: a name each, under which `native/compiled.py` compiles them."""

from collections.abc import Callable
from typing import Any

from numba import njit

part = njit(error_model="numpy")
"""A function that kernels call; it raises nothing, as they do not."""

KERNELS: dict[str, Callable[[Any, Any, Any], None]] = {}
"""Functions of the address of their arguments, the number of a thread and how many threads there are, by name."""
TEAMS: dict[str, Callable[[Any], None]] = {}
"""Functions of the address of a launch."""


def kernel(function: Callable[[Any, Any, Any], None]) -> None:
    """Let a function be a kernel, by its name without the underscore."""
    KERNELS[function.__name__.strip("_")] = function


def team(function: Callable[[Any], None]) -> None:
    """Let a function run the kernels of a launch."""
    TEAMS[function.__name__.strip("_")] = function
