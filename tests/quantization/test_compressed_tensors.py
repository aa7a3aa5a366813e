"""Checkpoints in compressed-tensors' format are what the package of that name reads and writes."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from tests.conftest import MakeModel
from tests.quantization.definition import changed_folder
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from hasten.checkpoint.sources import open_source
from hasten.cli.main import main
from hasten.quantization.scheme import SCHEMES

PRESETS = {"W4A16": 7.5, "W4A16_ASYM": 7.5, "W8A16": 127.5, "W8A8": 127.5, "FP8": 448.0, "FP8_DYNAMIC": 448.0}
"""Names that the package has for what others publish, and the greatest number of each."""
GROUP = 16


def assert_same_weights(out: Path, model: nn.Module, folder: Path, plain: Path) -> None:
    """`out` stands for the weights that `model`, which came from `folder`, has once the package widened them."""
    weights = model.state_dict()
    changed_folder(folder, plain, lambda state: state.update({name: weights[name].contiguous() for name in state}))
    found, expected = open_source(out), open_source(plain)
    assert found.format is not None
    for spec in found.specs:
        torch.testing.assert_close(found.shard(spec, 0, 1), expected.shard(spec, 0, 1), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # which is how to ask for plain weights
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_read_by_the_package(scheme: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder, out = make_model("Llama", num_hidden_layers=1), tmp_path / "out"
    assert main(["quantize", str(folder), str(out), "--scheme", scheme]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_same_weights(out, theirs, folder, tmp_path / "plain")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_package_writes_is_read(preset: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder, out = make_model("Llama", num_hidden_layers=1), tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(folder)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = GROUP
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            set_scales(module, PRESETS[preset])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    compressor.decompress_model(model)
    assert_same_weights(out, model, folder, tmp_path / "plain")


def set_scales(module: nn.Module, greatest: float) -> None:
    """Scales of a module's tensor, channels or groups by their largest weights, and zero points where it has some."""
    scale = module.weight_scale
    assert isinstance(scale, nn.Parameter)
    assert isinstance(module.weight, nn.Parameter)
    rows = 1 if scale.numel() == 1 else len(scale)
    parts = module.weight.data.reshape(rows, scale.numel() // rows, -1)
    scale.data.copy_((parts.abs().amax(2) / greatest).reshape(scale.shape))
    zeros = getattr(module, "weight_zero_point", None)
    if zeros is not None:
        zeros.data.copy_(torch.arange(zeros.numel()).reshape(zeros.shape) % 5 - 2)
    inputs = getattr(module, "input_scale", None)
    if inputs is not None:
        inputs.data.fill_(0.02)
