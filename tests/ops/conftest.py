"""What all tests of ops share: how exact an op must be, and memory that betrays whoever reads it before writing."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor

with suppress(ModuleNotFoundError):  # without triton there are no kernels
    import tests.interpreter  # noqa: F401  # they run on it where there is no GPU

Close = Callable[[str, Tensor, Tensor], None]

TOLERANCE: dict[str, dict[torch.dtype, float]] = {
    # fp32: rounding of sums in another order. Half types: all but the result is computed in fp32, so half a unit of
    # the last place of the result, and a little for results that lie between two numbers.
    "attention": {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3},
    "linear": {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 5e-3},
    "layer_norm": {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3},
    # The plain definition rounds to the type of its input after every step.
    "stepwise": {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2},
    # Tiles multiply values by weights in the type of both: as much again as the result's own rounding.
    "tile": {torch.float32: 5e-6, torch.float16: 1.2e-3, torch.bfloat16: 1e-2},
    # Sums in fp32 of products of half types, in the order and with the precision of matrix units.
    "parts": {torch.float32: 1e-4},
    # Inputs of 15 bits: half a unit of each of the values that are added up, and the result's own rounding.
    "digits": {torch.float32: 5e-4, torch.float16: 1.5e-3, torch.bfloat16: 8e-3},
    # A whole unit of the last place, where half types are cut off and not rounded.
    "cut off": {torch.bfloat16: 1e-2},
}
"""Largest error of an op, relative to values above 1 and absolute for those below."""


def exactly_activated(x: Tensor, name: str) -> Tensor:
    """An activation by its formula, in fp64."""
    x = x.double()
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return {
        "silu": lambda: x / (1 + torch.exp(-x)),
        "gelu": lambda: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": lambda: 0.5 * x * (1 + torch.tanh(inner)),
        "quick_gelu": lambda: x / (1 + torch.exp(-1.702 * x)),
        "relu": lambda: x.clamp(min=0),
        "relu2": lambda: x.clamp(min=0) ** 2,
    }[name]()


@pytest.fixture(scope="session")
def assert_close() -> Close:
    """`assert_close(kind, actual, expected)` within the tolerance of that kind and of the type of `actual`."""

    def check(kind: str, actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        assert not actual.isnan().any()
        bound = TOLERANCE[kind][actual.dtype]
        error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
        assert error.numel() == 0 or error.max() <= bound, f"error {error.max():.2e} of at most {bound:.0e}"

    return check


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New memory that is not written yet holds NaN: what an op forgets to write, or reads too early, shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
