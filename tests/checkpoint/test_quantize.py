"""`hasten quantize`: what it writes is what rounding to nearest says, and is read by hasten as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.quantization.definition import TRANSPOSED
from tests.quantization.writers import is_quantized, words
from torch import Tensor

from hasten.checkpoint.quantize import quantize
from hasten.checkpoint.sources import open_source
from hasten.cli.main import main
from hasten.core.errors import ConfigError, UnsupportedError

SCHEMES = {"int4": (4, 16), "int8": (8, None)}
MODELS: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 1, "hidden_size": 96, "n_head": 12},
    "Llama": {"num_hidden_layers": 1},
    "GPT2": {"n_layer": 1},
    "Mixtral": {"num_hidden_layers": 1, "num_local_experts": 4},
}


def rounded(weight_oh: Tensor, bits: int, size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers without sign, steps, and values: each part's largest magnitude is half a step beyond the last."""
    middle, numbers, steps, values = 2 ** (bits - 1), [], [], []
    for part in weight_oh.split(size or weight_oh.shape[1], 1):
        step = part.abs().amax(1, keepdim=True) / (middle - 0.5)
        number = torch.round(part / step).clamp(-middle, middle - 1)
        numbers.append(number + middle)
        steps.append(step)
        values.append(number * step)
    return torch.cat(numbers, 1), torch.cat(steps, 1), torch.cat(values, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", MODELS)
def test_weights_are_rounded_to_nearest_and_read_back(
    family: str, scheme: str, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, full = make_model(family, **MODELS[family]), tmp_path / "out", tmp_path / "full"
    bits, size = SCHEMES[scheme]
    if family == "Bloom" and size is not None:
        size = 32
    assert main(["quantize", str(folder), str(out), "--scheme", scheme]) == 0
    state, found = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    expected = dict(state)
    for name, weight in state.items():
        if not is_quantized(name, weight) or ".experts." in name:
            assert torch.equal(found[name], weight)
            continue
        turned = TRANSPOSED.search(name) is not None
        numbers, steps, values = rounded(weight.T if turned else weight, bits, size)
        module = name.removesuffix(".weight")
        assert torch.equal(found[f"{module}.weight_packed"], words(numbers.int(), bits, 1))
        assert torch.equal(found[f"{module}.weight_scale"], steps)
        expected[name] = (values.T if turned else values).contiguous()
    shutil.copytree(folder, full)
    save_file(expected, full / "model.safetensors", metadata={"format": "pt"})
    read, right = open_source(out), open_source(full)
    assert read.format is not None
    assert read.format.name == "compressed-tensors"
    for spec in read.specs:
        torch.testing.assert_close(read.shard(spec, 0, 1), right.shard(spec, 0, 1), rtol=1e-6, atol=0)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == size
    line = capsys.readouterr().out
    assert line.startswith(f"{out}: ")
    assert f"weights in {scheme}, " in line
    assert {path.name for path in folder.iterdir()} == {path.name for path in out.iterdir()}


def test_several_files_become_as_many(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("Llama", **MODELS["Llama"]), tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, folder / f"part-{number}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    made = quantize(str(folder), tmp_path / "out", "int8")
    assert (made.tensors, made.bytes_after < made.bytes_before) == (7, True)
    assert 0.001 < made.error < 0.02
    whole = quantize(str(make_model("Llama", **MODELS["Llama"])), tmp_path / "whole", "int8")
    assert whole == made
    one, other = open_source(tmp_path / "out"), open_source(tmp_path / "whole")
    assert len(one.files) == 2
    assert all(torch.equal(one.shard(spec, 0, 1), other.shard(spec, 0, 1)) for spec in one.specs)


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    folder, out = make_model("Llama", **MODELS["Llama"]), tmp_path / "out"
    odd = make_model("Llama", num_hidden_layers=1, intermediate_size=72)
    with pytest.raises(
        UnsupportedError, match=r"int4 needs input features that are a multiple of 16, .* 48, 72; use int8"
    ):
        quantize(str(odd), out, "int4")
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    state = load_file(damaged / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    assert main(["quantize", str(damaged), str(out), "--scheme", "int4"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}
    quantize(str(folder), out, "int4")
    with pytest.raises(UnsupportedError, match=r"out is quantized already \(compressed-tensors\)"):
        quantize(str(out), tmp_path / "again", "int4")
    with pytest.raises(ConfigError, match=r"out exists; give a folder that is new or empty"):
        quantize(str(folder), out, "int4")
