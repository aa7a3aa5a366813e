"""Checkpoints in int-quantized, float-quantized and fp8, written here: values, products, what is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import MakeModel
from tests.engine_logits import DECODED, engine_logits
from tests.quantization.definition import changed_folder
from tests.quantization.test_formats import MODELS, opened, weight
from tests.quantization.writers import Case, Rounded, write
from torch import Tensor

from hasten.core.errors import CheckpointError, HastenError
from hasten.ops import QuantizedWeight
from hasten.quantization.formats.registry import format_of

E4M3 = torch.float8_e4m3fn
BLOCK = 16


@dataclass(frozen=True)
class Scaled(Rounded):
    """A weight of 8 bits: `numbers_oh` in its type, `zeros_og` zeros."""

    stored_scales: Tensor | None = None
    """As the file has them."""


@dataclass(frozen=True)
class EightBit(Case):
    """`strategy` is that of the weights; `scale` what their scales are called."""

    strategy: str = "channel"
    dtype: torch.dtype = torch.int8
    scale: str = "weight_scale"

    def rounded(self, weight_oh: Tensor) -> Rounded:
        """A weight as this case has it."""
        largest = 127 if self.dtype == torch.int8 else 448
        rows, columns = weight_oh.shape
        height, width = {"channel": (1, columns), "tensor": (rows, columns), "block": (BLOCK, BLOCK)}[self.strategy]
        padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
        padded[:rows, :columns] = weight_oh
        scales = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).abs().amax((1, 3)) / largest
        of_rows = scales.repeat_interleave(height, 0)[:rows]
        groups = torch.arange(columns) // width
        numbers = weight_oh / of_rows[:, groups]
        numbers = numbers.round().to(torch.int8) if self.dtype == torch.int8 else numbers.to(E4M3)
        stored = scales.reshape(1) if self.strategy == "tensor" else scales
        return Scaled(numbers, of_rows, torch.zeros_like(of_rows), groups, stored)


def _pack(case: Case, made: Rounded) -> dict[str, Tensor]:
    assert isinstance(case, EightBit)
    assert isinstance(made, Scaled)
    assert made.stored_scales is not None
    arrays = {"weight": made.numbers_oh.contiguous(), case.scale: made.stored_scales.contiguous()}
    return arrays | ({"input_scale": torch.ones(1)} if case.strategy == "tensor" else {})


def compressed(kind: str, strategy: str, activations: dict[str, Any] | None) -> EightBit:
    """compressed-tensors' int-quantized or float-quantized."""
    arguments = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = arguments | {"strategy": strategy} | ({"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {})
    inputs = None if activations is None else arguments | activations
    config = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head"],
    }
    return EightBit(config, _pack, strategy=strategy, dtype=torch.int8 if kind == "int" else E4M3)


def fp8(block: int | None) -> EightBit:
    """DeepSeek's files, or those of AutoFP8."""
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic" if block else "static"}
    if block is None:
        return EightBit(config, _pack, strategy="tensor", dtype=E4M3)
    config |= {"weight_block_size": [block, block], "fmt": "e4m3"}
    return EightBit(config, _pack, strategy="block", dtype=E4M3, scale="weight_scale_inv")


PER_TOKEN = {"strategy": "token", "dynamic": True}
STATIC = {"strategy": "tensor", "dynamic": False}
CASES = {
    "int8, channels": compressed("int", "channel", PER_TOKEN),
    "int8, static": compressed("int", "tensor", STATIC),
    "int8 weights alone": compressed("int", "channel", None),
    "fp8, channels": compressed("float", "channel", PER_TOKEN),
    "fp8, static": compressed("float", "tensor", STATIC),
    "fp8, blocks": compressed("float", "block", {"strategy": "group", "group_size": BLOCK, "dynamic": True}),
    "weight_scale_inv": fp8(BLOCK),
    "fp8 method, static": fp8(None),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_values_are_exact_on_every_rank(case: EightBit, family: str, make_model: MakeModel, tmp_path: Path) -> None:
    quantized, full = map(opened, write(make_model(family, **MODELS[family]), tmp_path, case))
    held = set()
    for spec in quantized.specs:
        found = quantized.weight(spec, 0, 1, torch.float32)
        if isinstance(found, QuantizedWeight):
            held.add((found.values.dtype, found.inputs))
        for size in (1, 2, 4):
            for rank in range(size):
                expected = full.shard(spec, rank, size)
                assert torch.equal(weight(quantized, spec, rank, size), expected), (spec.name, rank, size)
    alone = case is CASES["int8 weights alone"]
    assert held == (set() if case.strategy == "block" else {(case.dtype, None if alone else case.dtype)})


PROMPTS = [list(range(20, 40))]


def logits_of(folder: Path) -> Tensor:
    options: dict[str, Any] = {"dtype": "fp32", "kv_cache_memory": 8 << 20}
    return torch.cat(engine_logits(folder, PROMPTS, [[7] * DECODED], "cpu", **options))


@pytest.mark.parametrize("name", ["int8, channels", "int8 weights alone", "fp8, static", "weight_scale_inv"])
def test_logits_are_near_those_of_the_values(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    quantized, full = write(make_model("Llama", **MODELS["Llama"]), tmp_path, CASES[name])
    found, expected = logits_of(quantized), logits_of(full)
    bound = 0.1 if name in ("int8, channels", "fp8, static") else 2e-3
    assert (found - expected).norm() <= bound * expected.norm()


Change = Callable[[dict[str, Tensor]], object]
MODULE = "model.layers.0.mlp.up_proj"
DAMAGES: dict[str, tuple[str, Change, str]] = {
    "no scale": (
        "int8, channels",
        lambda state: state.pop(f"{MODULE}.weight_scale"),
        rf"tensor '{MODULE}\.weight' has type torch\.int8; hasten reads",
    ),
    "no weight": (
        "fp8, channels",
        lambda state: state.pop(f"{MODULE}.weight"),
        r"lacks tensor 'layers\.0\.mlp\.up_proj\.weight', which compressed-tensors keeps with 'layers\.0\.mlp\.up",
    ),
    "NaN": (
        "fp8, channels",
        lambda state: state[f"{MODULE}.weight_scale"].fill_(float("nan")),
        rf"tensor '{MODULE}\.weight_scale' has NaN or infinity: the checkpoint is damaged",
    ),
    "another type": (
        "fp8, channels",
        lambda state: state.update({f"{MODULE}.weight": state[f"{MODULE}.weight"].to(torch.int8)}),
        rf"tensor '{MODULE}\.weight' has type torch\.int8, but config_groups\.group_0\.weights\.type float asks for",
    ),
    "scales of other blocks": (
        "weight_scale_inv",
        lambda state: state.update({f"{MODULE}.weight_scale_inv": torch.ones(1, 1)}),
        rf"tensor '{MODULE}\.weight_scale_inv' has shape \(1, 1\), but weight_block_size \[16, 16\] asks for",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_tensor_and_key(damage: str, make_model: MakeModel, tmp_path: Path) -> None:
    name, change, message = DAMAGES[damage]
    quantized, _ = write(make_model("Llama", **MODELS["Llama"]), tmp_path, CASES[name])
    folder = changed_folder(quantized, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)


def read_all(folder: Path) -> None:
    source = opened(folder)
    for spec in source.specs:
        source.weight(spec, 0, 1, torch.float32)


def changed(name: str, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A configuration with other arguments of its weights."""
    config: dict[str, Any] = {"quantization_config": {**CASES[name].config}}
    if "config_groups" in config["quantization_config"]:
        group = {**config["quantization_config"]["config_groups"]["group_0"]}
        group["weights"] = {**group["weights"]}
        config["quantization_config"]["config_groups"] = {"group_0": group}
        change(group)
    else:
        change(config["quantization_config"])
    return config


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("int8, channels", lambda group: group["weights"].update(num_bits=4), r"int of num_bits 4; int of 8 bits is"),
        (
            "int8, channels",
            lambda group: group["weights"].update(strategy="group"),
            "strategy 'group'; tensor",
        ),
        ("int8, channels", lambda group: group["weights"].update(symmetric=False), "symmetric false is not supported"),
        ("fp8, channels", lambda group: group.update(input_activations=None), "type float without input_activations"),
        ("weight_scale_inv", lambda raw: raw.update(weight_block_size=[128]), r"weight_block_size \[128\] is not two"),
        ("weight_scale_inv", lambda raw: raw.update(fmt="e5m2"), "fmt 'e5m2' is not supported; e4m3 is"),
    ],
)
def test_what_is_not_read_is_refused_by_key(
    name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(HastenError, match=message):
        format_of(changed(name, change))
