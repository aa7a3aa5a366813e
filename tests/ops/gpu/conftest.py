"""Kernels on a GPU where there is one, and on Triton's interpreter otherwise: the launchers take CPU tensors too."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

Close = Callable[[str, Tensor, Tensor], None]

# Deterministic algorithms, which poison new memory, refuse cuBLAS without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def assert_close(assert_close: Close) -> Close:
    """As for other ops. The interpreter cuts what does not fit into bf16 off instead of rounding."""

    def check(kind: str, actual: Tensor, expected: Tensor) -> None:
        cut = actual.dtype == torch.bfloat16 and not actual.is_cuda
        assert_close("cut off" if cut else kind, actual, expected)

    return check
