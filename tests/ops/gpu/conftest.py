"""Kernels on a GPU where there is one, and on Triton's interpreter otherwise: the launchers take CPU tensors too."""

import os

import pytest
import torch

pytest.importorskip("triton")

# Deterministic algorithms, which poison new memory, refuse cuBLAS without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
