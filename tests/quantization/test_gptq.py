"""GPTQ compared with its definition, which eliminates one input feature after the other from the inverse Hessian."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.quantization.gptq import round_by_gptq
from hasten.quantization.grid import E4M3, Grid, RoundedWeight

Array = NDArray[np.float64]
OUT, WIDTH, TOKENS = 24, 192, 600
GRIDS = {"int4 in groups": Grid(4, group_size=64), "int8": Grid(8), "fp8": Grid(8, E4M3)}
DAMPENING = 0.02


def inputs() -> Tensor:
    """Tokens whose features go together, some of them much larger than others."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    sizes = torch.rand(WIDTH, generator=generator).mul(3).exp()
    common, own = (torch.randn(TOKENS, width, generator=generator) for width in (12, WIDTH))
    return (common @ mixing[:12] * 4 + own) * sizes


@pytest.fixture(scope="module")
def x_th() -> Tensor:
    return inputs()


@pytest.fixture(scope="module")
def weight_oh() -> Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(7))


def nearest(ratio: Array, grid: Grid) -> Array:
    if grid.dtype == E4M3:
        return torch.from_numpy(ratio).float().clamp(-448, 448).to(E4M3).double().numpy()
    half = 2 ** (grid.bits - 1)
    return np.clip(np.rint(ratio), -half, half - 1)


def eliminated(weight: Array, hessian: Array, steps: Array, grid: Grid) -> Array:
    """The values that features become: the largest diagonal first, each error spread by the inverse of what is left."""
    width = weight.shape[1]
    hessian = hessian + DAMPENING * np.mean(np.diag(hessian)) * np.eye(width)
    inverse, left, values = np.linalg.inv(hessian), weight.copy(), np.empty_like(weight)
    for feature in np.argsort(-np.diag(hessian), kind="stable"):
        values[:, feature] = nearest(left[:, feature] / steps[:, feature], grid) * steps[:, feature]
        error = (left[:, feature] - values[:, feature]) / inverse[feature, feature]
        left -= np.outer(error, inverse[feature])
        inverse -= np.outer(inverse[:, feature], inverse[feature]) / inverse[feature, feature]
    return values


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_values_are_those_of_the_definition(grid: Grid, x_th: Tensor, weight_oh: Tensor) -> None:
    hessian = x_th.T @ x_th / TOKENS
    found = round_by_gptq(weight_oh, hessian, grid, torch.float32, dampening=DAMPENING)
    size = grid.group_size or WIDTH
    steps = found.scales.double().repeat_interleave(size, 1).numpy()
    expected = eliminated(weight_oh.double().numpy(), hessian.double().numpy(), steps, grid)
    values = found.dequantized().numpy()
    # a ratio in the middle of two numbers may become either, and what follows takes up another error
    assert np.mean(np.abs(values - expected) <= 1e-5 * np.abs(expected).max()) >= 0.99


def error(made: RoundedWeight, weight_oh: Tensor, x_th: Tensor) -> float:
    return float((x_th @ (made.dequantized() - weight_oh).T).square().mean())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_outputs_are_nearer_than_by_rounding_to_nearest(grid: Grid, x_th: Tensor, weight_oh: Tensor) -> None:
    result = round_by_gptq(weight_oh, x_th.T @ x_th / TOKENS, grid, torch.float32)
    plain = grid.rounded(weight_oh, grid.scales(weight_oh, torch.float32))
    assert error(result, weight_oh, x_th) < 0.5 * error(plain, weight_oh, x_th)


def test_scales_for_important_features_err_less_there(weight_oh: Tensor) -> None:
    grid, importance = GRIDS["int4 in groups"], torch.rand(WIDTH, generator=torch.Generator().manual_seed(8)) ** 6
    found = [grid.rounded(weight_oh, grid.scales(weight_oh, torch.float32, each)) for each in (None, importance)]
    plain, weighted = (((result.dequantized() - weight_oh).square() * importance).sum() for result in found)
    assert weighted < 0.9 * plain


def test_features_without_inputs_and_too_few_tokens_are_no_trouble(weight_oh: Tensor, x_th: Tensor) -> None:
    few, grid = x_th[:5].clone(), GRIDS["int4 in groups"]
    few[:, ::3] = 0
    result = round_by_gptq(weight_oh, few.T @ few / len(few), grid, torch.float16, dampening=1e-6)
    assert result.scales.dtype == torch.float16
    assert bool(result.dequantized().isfinite().all())
    plain = grid.rounded(weight_oh, result.scales)
    assert torch.equal(result.numbers[:, ::3], plain.numbers[:, ::3])
    assert not torch.equal(result.numbers, plain.numbers)
    nothing = round_by_gptq(weight_oh, torch.zeros(WIDTH, WIDTH), Grid(8), torch.float32)
    assert torch.equal(nothing.numbers, Grid(8).rounded(weight_oh, nothing.scales).numbers)
