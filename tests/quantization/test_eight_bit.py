"""Schemes of 8 bits alone: which parameters they take, and what they make of them. Shapes: o out, h in."""

import pytest
import torch
from tests.quantization.definition import TYPES, rounded
from torch import Tensor, nn

from hasten.core.dtypes import QUANTIZATIONS
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.core.model_config import AttentionConfig, ExpertsConfig, ModelConfig
from hasten.models.registry import model_class
from hasten.ops import QuantizedWeight, multiplies
from hasten.quantization import eight_bit
from hasten.quantization.scheme import SCHEMES, Quantizer

KINDS = ["int8", "w8a8", "fp8"]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_every_scheme_of_the_configuration_is_there() -> None:
    assert tuple(SCHEMES) == QUANTIZATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 333), (509, 64), (64, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_to_values_of_their_type_times_a_scale_of_their_row(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(*shape, dtype=dtype)
    weight[0] = 0
    before = weight.clone()
    for elements in (1, 1000, 1 << 24):  # pieces of one row, of some, and of all
        monkeypatch.setattr(eight_bit, "_ELEMENTS", elements)
        result = SCHEMES[kind].quantize(weight, "w")
        assert isinstance(result, QuantizedWeight)
        assert (result.values.dtype, result.scales.dtype, result.dtype) == (TYPES[kind], torch.float32, dtype)
        assert result.inputs == (None if kind == "int8" else TYPES[kind])
        assert result.shape == shape
        found = result.values.double() * result.scales.double().unsqueeze(1)
        torch.testing.assert_close(found, rounded(weight.float(), TYPES[kind]).double(), rtol=1e-6, atol=0)
        off = (found - weight.double()).abs()
        step = (
            result.scales.max() if kind != "fp8" else (weight.double().abs() / 8).maximum(result.scales.max() * 2**-9)
        )
        assert bool((off <= 0.5001 * step).all())
        assert not found[0].any()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_scale_holds_is_refused_with_tensor_and_row(kind: str, value: float) -> None:
    weight = draw(9, 8)
    weight[5, 3] = value
    message = rf"tensor layers\.0\.mlp\.up\.weight has NaN or infinity in row 5, which {kind} cannot hold"
    with pytest.raises(CheckpointError, match=message):
        SCHEMES[kind].quantize(weight, "layers.0.mlp.up.weight")


def test_a_gpu_that_cannot_multiply_in_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not multiplies(torch.float8_e4m3fn, torch.device("cuda", 0))
    assert multiplies(torch.int8, torch.device("cuda", 0))
    assert multiplies(torch.float8_e4m3fn, torch.device("cpu"))
    monkeypatch.setattr(eight_bit, "multiplies", lambda dtype, device: False)
    with pytest.raises(UnsupportedError, match=r"^quantization fp8 needs a GPU of compute capability 8\.9 or later"):
        SCHEMES["fp8"].quantize(draw(9, 8), "w")


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
    for kind, of_head, of_qkv in (("int8", "int8", "int8"), ("w8a8", "w8a8", "int8"), ("fp8", "int8", "fp8")):
        quantizer = Quantizer(SCHEMES[kind], built(tied))
        expected = dict.fromkeys(LAYER, kind) | {head: of_head, "layers.0.attention.qkv.weight": of_qkv}
        assert {name: scheme.name for name, scheme in quantizer.schemes.items()} == expected
        weight = draw(16)
        assert quantizer("final_norm.weight", weight) is weight
        quantized = quantizer(head, draw(40, 16))
        assert isinstance(quantized, QuantizedWeight)
        assert quantized.values.dtype == TYPES[of_head]


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
    assert set(Quantizer(SCHEMES["int8"], model).schemes) == {
        "layers.0.attention.qkv.weight",
        "layers.0.attention.dense.weight",
        "head.weight",
    }
