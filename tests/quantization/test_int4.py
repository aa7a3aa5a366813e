"""The scheme alone: what int4 makes of weights. Shapes: o out, h in."""

import pytest
import torch
from torch import Tensor

from hasten.core.errors import CheckpointError
from hasten.ops import GroupedWeight
from hasten.quantization import int4
from hasten.quantization.scheme import SCHEMES

SCHEME = SCHEMES["int4"]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def rounded(weight_oh: Tensor) -> Tensor:
    """What int4 stands for: of each 128 inputs, whole multiples from -8 to 7 of a step in bf16."""
    parts = []
    for part in weight_oh.float().split(128, 1):
        step = (part.abs().amax(1, keepdim=True) / 7.5).bfloat16().float()
        parts.append(torch.round(part / torch.where(step == 0, 1, step)).clamp(-8, 7) * step)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 48), (40, 128), (7, 200), (50, 512), (2, 333)], ids=str)
def test_weights_are_rounded_to_multiples_of_a_step_of_their_group(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(*shape, dtype=dtype)
    weight[0] = 0
    before = weight.clone()
    for elements in (1, 1000, 1 << 24):  # pieces of one row, of some, and of all
        monkeypatch.setattr(int4, "_ELEMENTS", elements)
        result = SCHEME.quantize(weight, "w")
        assert isinstance(result, GroupedWeight)
        assert (result.scales.dtype, result.dtype) == (torch.bfloat16, dtype)
        assert result.shape == shape
        assert result.is_packed == (shape[1] % 128 == 0 or shape[1] in (200, 333))  # these have padding
        assert torch.equal(result.dequantized(torch.float32), rounded(weight))
    assert torch.equal(weight, before)


def test_half_a_step_is_the_largest_error() -> None:
    weight = torch.linspace(-1, 1, 128).expand(3, 128)
    found = SCHEME.quantize(weight, "w")
    assert isinstance(found, GroupedWeight)
    assert (found.dequantized(torch.float32) - weight).abs().max() <= 0.502 / 7.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_no_scale_holds_is_refused_with_tensor_and_row(value: float) -> None:
    weight = draw(9, 200)
    weight[5, 130] = value
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.mlp\.up\.weight has NaN or infinity in row 5, which"):
        SCHEME.quantize(weight, "layers.0.mlp.up.weight")
