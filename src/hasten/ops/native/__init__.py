"""Kernels for a CPU in Python, compiled by numba where that is installed: the extra `cpu`."""

from functools import cache
from importlib.util import find_spec


class Kernels:
    """The modules of kernels; making it compiles them, or reads them from numba's cache."""

    def __init__(self) -> None:
        from hasten.ops.native import attention, choice, norms, products, record

        self.attention, self.choice, self.norms, self.products = attention, choice, norms, products
        self.record = record


@cache
def kernels() -> Kernels | None:
    """The kernels; None where numba is not installed."""
    return None if find_spec("numba") is None else Kernels()
