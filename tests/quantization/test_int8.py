"""The scheme alone: which parameters it takes, and what it makes of them. Shapes: o out, h in."""

import pytest
import torch
from tests.quantization.definition import rounded
from torch import Tensor, nn

from hasten.core.config import QUANTIZATIONS, AttentionConfig, ExpertsConfig, ModelConfig
from hasten.core.errors import CheckpointError
from hasten.models.registry import model_class
from hasten.ops import QuantizedWeight
from hasten.quantization import int8
from hasten.quantization.scheme import SCHEMES, Quantizer

SCHEME = SCHEMES["int8"]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_every_scheme_of_the_configuration_is_there() -> None:
    assert tuple(SCHEMES) == QUANTIZATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 333), (509, 64), (64, 1)], ids=str)
def test_weights_are_rounded_to_multiples_of_a_step_of_their_row(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(*shape, dtype=dtype)
    weight[0] = 0
    before = weight.clone()
    for elements in (1, 1000, 1 << 24):  # pieces of one row, of some, and of all
        monkeypatch.setattr(int8, "_ELEMENTS", elements)
        made = SCHEME.quantize(weight, "w")
        assert isinstance(made, QuantizedWeight)
        assert (made.values.dtype, made.scales.dtype, made.dtype) == (torch.int8, torch.float32, dtype)
        assert made.shape == shape
        found = made.values.double() * made.scales.double().unsqueeze(1)
        torch.testing.assert_close(found, rounded(weight.float()).double(), rtol=1e-6, atol=0)
        assert (found - weight.double()).abs().max() <= 0.5001 * made.scales.max()
        assert not found[0].any()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_no_scale_holds_is_refused_with_tensor_and_row(value: float) -> None:
    weight = draw(9, 8)
    weight[5, 3] = value
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.mlp\.up\.weight has NaN or infinity in row 5, which"):
        SCHEME.quantize(weight, "layers.0.mlp.up.weight")


def built(tied: bool) -> nn.Module:
    config = ModelConfig(
        architecture="BloomForCausalLM",
        num_layers=1,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=40,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_size=8),
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return model_class(config.architecture)(config)


LAYER = {f"layers.0.{name}.weight" for name in ("attention.qkv", "attention.dense", "mlp.up", "mlp.down")}


@pytest.mark.parametrize(("tied", "head"), [(True, "embedding.weight"), (False, "head.weight")])
def test_linear_layers_and_the_head_are_quantized_and_nothing_else(tied: bool, head: str) -> None:
    quantizer = Quantizer(SCHEME, built(tied))
    assert set(quantizer.schemes) == LAYER | {head}
    weight = draw(16)
    assert quantizer("final_norm.weight", weight) is weight
    assert isinstance(quantizer(head, draw(40, 16)), QuantizedWeight)


def test_routers_and_experts_stay_as_they_are() -> None:
    experts = ExpertsConfig(num_experts=4, top_k=2, inner_size=8, normalized=True)
    config = ModelConfig(
        architecture="MixtralForCausalLM",
        num_layers=1,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=40,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_size=8),
        experts=experts,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = model_class(config.architecture)(config)
    assert set(Quantizer(SCHEME, model).schemes) == {
        "layers.0.attention.qkv.weight",
        "layers.0.attention.dense.weight",
        "head.weight",
    }
