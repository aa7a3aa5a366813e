"""Kernels for a CPU in Python, compiled by numba where that is installed: the extra `cpu`."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

from hasten.ops.native import pages

__all__ = ["Kernels", "are_installed", "integer_kernels", "kernels", "pages"]


class Kernels:
    """The modules of kernels; making it compiles them, or reads them from the user's cache."""

    def __init__(self) -> None:
        from hasten.ops.native import (
            attention,
            beams,
            bf16,
            choice,
            compiled,
            edits,
            norms,
            products,
            prompts,
            record,
            sampling,
        )

        self.attention, self.prompts, self.choice, self.norms = attention, prompts, choice, norms
        self.products, self.beams, self.edits, self.record = products, beams, edits, record
        self.sampling, self.bf16 = sampling, bf16
        self.integers: ModuleType | None = None
        """Products with weights of 8 and 4 bits; None on a processor without AVX-512 VNNI."""
        if compiled.multiplies_bytes():
            from hasten.ops.native import integers

            self.integers = integers


@cache
def are_installed() -> bool:
    """Whether there are kernels, compiled or not."""
    return find_spec("numba") is not None


@cache
def kernels() -> Kernels | None:
    """The kernels; None where numba is not installed."""
    return Kernels() if are_installed() else None


def integer_kernels() -> ModuleType | None:
    """Those of weights of 8 and 4 bits; None without numba, or on a processor that cannot multiply by them."""
    found = kernels()
    return None if found is None else found.integers
