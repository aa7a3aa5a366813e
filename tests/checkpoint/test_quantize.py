"""Checkpoints with quantized linear layers: what rounding to nearest writes is what it says, and is read as it is."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.quantization.definition import TRANSPOSED, changed_folder
from tests.quantization.writers import is_quantized, words
from torch import Tensor

from hasten.checkpoint import quantize
from hasten.checkpoint.quantize import Summary, ToNearest, open_unquantized, scheme_for, write_quantized
from hasten.checkpoint.sources import open_source
from hasten.cli.main import main
from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.models.weight_map import WeightSpec
from hasten.quantization.grid import RoundedWeight

SCHEMES: dict[Quantization, int | None] = {"int4": 16, "int8": None, "w8a8": None, "fp8": None}
"""Sizes of groups of LLaMA's weights."""
TYPES = ("w8a8", "fp8")
"""Schemes that round activations, too."""
E4M3 = torch.float8_e4m3fn
MODELS: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 1, "hidden_size": 96, "n_head": 12},
    "Llama": {"num_hidden_layers": 1},
    "GPT2": {"n_layer": 1},
    "Mixtral": {"num_hidden_layers": 1, "num_local_experts": 4},
}


def nearest(folder: Path, out: Path, scheme: Quantization) -> Summary:
    source = open_unquantized(str(folder))
    fitting = scheme_for(source, scheme)
    return write_quantized(source, out, fitting, ToNearest(source, fitting))


def rounded(weight_oh: Tensor, scheme: str, size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Signed numbers, steps, and values: each part's largest magnitude is half a step beyond the last, or 448."""
    half, numbers, steps, values = 2 ** (3 if scheme == "int4" else 7), [], [], []
    for part in weight_oh.split(size or weight_oh.shape[1], 1):
        step = part.abs().amax(1, keepdim=True) / (448 if scheme == "fp8" else half - 0.5)
        ratio = part / step
        number = ratio.to(E4M3).float() if scheme == "fp8" else torch.round(ratio).clamp(-half, half - 1)
        numbers.append(number)
        steps.append(step)
        values.append(number * step)
    return torch.cat(numbers, 1), torch.cat(steps, 1), torch.cat(values, 1)


def expected_tensors(weight_oh: Tensor, scheme: str, size: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """By what they are called behind the module's name, and the values that they stand for."""
    numbers, steps, values = rounded(weight_oh, scheme, size)
    if scheme in ("w8a8", "fp8"):
        return {"weight": numbers.to(E4M3 if scheme == "fp8" else torch.int8), "weight_scale": steps}, values
    bits = 4 if scheme == "int4" else 8
    packed = words((numbers + 2 ** (bits - 1)).int(), bits, 1)
    return {"weight_packed": packed, "weight_scale": steps, "weight_shape": torch.tensor(weight_oh.shape)}, values


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", MODELS)
def test_weights_are_rounded_to_nearest_and_read_back(
    family: str, scheme: Quantization, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, full = make_model(family, **MODELS[family]), tmp_path / "out", tmp_path / "full"
    size = 32 if family == "Bloom" and scheme == "int4" else SCHEMES[scheme]
    assert main(["quantize", str(folder), str(out), "--scheme", scheme]) == 0
    state, found = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    expected = dict(state)
    for name, weight in state.items():
        if not is_quantized(name, weight) or ".experts." in name:
            assert torch.equal(found.pop(name), weight)
            continue
        turned = TRANSPOSED.search(name) is not None
        tensors, values = expected_tensors(weight.T if turned else weight, scheme, size)
        for kind, tensor in tensors.items():
            stored = found.pop(f"{name.removesuffix('.weight')}.{kind}")
            assert stored.dtype == tensor.dtype
            assert torch.equal(stored.float(), tensor.float())
        expected[name] = (values.T if turned else values).contiguous()
    assert not found
    shutil.copytree(folder, full)
    save_file(expected, full / "model.safetensors", metadata={"format": "pt"})
    read, right = open_source(out), open_source(full)
    assert read.format is not None
    assert read.format.name == "compressed-tensors"
    for spec in read.specs:
        torch.testing.assert_close(read.shard(spec, 0, 1), right.shard(spec, 0, 1), rtol=1e-6, atol=0)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    group = config["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == size
    inputs = group["input_activations"]
    assert (inputs and (inputs["strategy"], inputs["dynamic"])) == (("token", True) if scheme in TYPES else None)
    line = capsys.readouterr().out
    assert line.startswith(f"{out}: ")
    assert f"weights in {scheme}, " in line
    assert ("the experts of the mixture stay" in line) == (family == "Mixtral")
    assert {path.name for path in folder.iterdir()} == {path.name for path in out.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_packed_weights_alone_have_scales_of_16_bits(dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    folder = changed_folder(
        make_model("Llama", **MODELS["Llama"]),
        tmp_path / "model",
        lambda state: state.update({name: weight.to(dtype) for name, weight in state.items()}),
    )
    for scheme in SCHEMES:
        nearest(folder, tmp_path / scheme, scheme)
        found = load_file(tmp_path / scheme / "model.safetensors")
        scales = {tensor.dtype for name, tensor in found.items() if name.endswith("weight_scale")}
        assert scales == {torch.float32 if scheme in TYPES else dtype}


def test_large_checkpoints_are_several_files(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("Llama", **MODELS["Llama"])
    whole = nearest(folder, tmp_path / "whole", "int8")
    assert (whole.tensors, whole.bytes_after < whole.bytes_before) == (7, True)
    monkeypatch.setattr(quantize, "_FILE_BYTES", whole.bytes_after // 3)
    assert nearest(folder, tmp_path / "out", "int8") == whole
    first, other = open_source(tmp_path / "out"), open_source(tmp_path / "whole")
    assert len(first.files) == 2
    assert all(torch.equal(first.shard(spec, 0, 1), other.shard(spec, 0, 1)) for spec in first.specs)


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    folder, out = make_model("Llama", **MODELS["Llama"]), tmp_path / "out"
    odd = make_model("Llama", num_hidden_layers=1, intermediate_size=72)
    with pytest.raises(
        UnsupportedError, match=r"int4 needs input features that are a multiple of 16, .* 48, 72; use int8"
    ):
        nearest(odd, out, "int4")
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    state = load_file(damaged / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    assert main(["quantize", str(damaged), str(out), "--scheme", "int4"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}
    nearest(folder, out, "int4")
    with pytest.raises(UnsupportedError, match=r"out is quantized already \(compressed-tensors\); give the full"):
        nearest(out, tmp_path / "again", "int4")
    with pytest.raises(ConfigError, match=r"out exists; give a folder that is new or empty"):
        nearest(folder, out, "int4")


class Interrupted(ToNearest):
    """A run that is interrupted in the middle."""

    def changes(self, specs: Sequence[WeightSpec]) -> Mapping[str, RoundedWeight]:
        if specs[0].name.startswith("layers."):
            raise KeyboardInterrupt
        return super().changes(specs)


def test_an_interrupt_or_a_full_disk_leaves_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_unquantized(str(make_model("Llama", **MODELS["Llama"])))
    scheme = scheme_for(source, "int8")
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        write_quantized(source, out, scheme, Interrupted(source, scheme))
    assert not list(tmp_path.iterdir())

    def full(*_: object, **__: object) -> NoReturn:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(quantize, "save_file", full)
    with pytest.raises(CheckpointError, match=r"^no space left to write .*out .*; free some, or give another folder$"):
        write_quantized(source, out, scheme, ToNearest(source, scheme))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_goes_with_the_next(make_model: MakeModel, tmp_path: Path) -> None:
    left = tmp_path / ".out.hasten-abc"
    (left / "new").mkdir(parents=True)
    (left / "new" / "part-0.safetensors").write_bytes(b"half")
    (left / ".lock").touch()
    nearest(make_model("Llama", **MODELS["Llama"]), tmp_path / "out", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
