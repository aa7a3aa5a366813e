"""Layers that are run one after the other over samples: what they compute, how they are rounded, what is written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import MakeModel, stories
from tests.encoders import save_encoder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hasten.checkpoint.quantize import open_unquantized, parts_of, scheme_for, write_quantized
from hasten.checkpoint.sources import open_source
from hasten.cli.main import main
from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.engine.calibration.calibrated import Calibrated
from hasten.engine.calibration.layer import Layer, Method
from hasten.engine.calibration.quantize import QuantizeOptions, quantize
from hasten.quantization.grid import RoundedWeight

pytestmark = pytest.mark.any_python

FAMILIES: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 2},
    "Llama": {"num_hidden_layers": 2},
    "GPT2": {"n_layer": 2},
    "GPTNeoX": {"num_hidden_layers": 2, "rotary_pct": 0.5},
    "Gemma2": {"num_hidden_layers": 2, "head_dim": 12},
}
"""Norms with and without biases or offsets; layers in a row and side by side; weights fused, apart, by head, turned."""
EXACT = 1e-5
SAMPLES = [torch.randint(4, 200, (length,), generator=torch.Generator().manual_seed(length)).tolist()
           for length in range(20, 44)]  # fmt: skip
SMOOTHS, COMPENSATES = Method(smooths=True), Method(compensates=True)


def calibrated(folder: Path, scheme: Quantization, method: Method, **options: Any) -> Calibrated:
    source = open_unquantized(str(folder))
    return Calibrated(
        source, scheme_for(source, scheme), method, SAMPLES, torch.device("cpu"), torch.float32, **options
    )


def run_through(walk: Calibrated) -> tuple[dict[str, Any], list[Tensor]]:
    """What parameters become, and the hidden states after the last layer."""
    changes: dict[str, Any] = {}
    for part in parts_of(walk._source.specs):
        changes |= walk.changes(part)
    return changes, walk._hidden


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded."""
    monkeypatch.setattr(Layer, "rounded", lambda *_: {})


def last_layer(model: nn.Module) -> nn.Module:
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2]
    return layers[0][-1]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, make_model: MakeModel) -> Path:
    return make_model(request.param, **FAMILIES[request.param])


def expected_hidden(folder: Path) -> Tensor:
    """What transformers' last layer gives for all tokens of all samples."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).reshape(-1, output[0].shape[-1]))

    last_layer(model).register_forward_hook(keep)
    with torch.no_grad():
        for ids in SAMPLES:
            model(torch.tensor([ids]))
    return torch.cat(found)


def test_layers_compute_what_the_model_does_and_moved_scales_change_nothing(
    folder: Path, full_precision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.engine.calibration.calibrated._BATCH_TOKENS", 200)
    done: list[int] = []
    _, hidden = run_through(calibrated(folder, "int4", COMPENSATES, advance=done.append))
    expected = expected_hidden(folder)
    scale = float(expected.abs().max())
    assert len(hidden) > 2
    assert done == [1, 1]
    assert float((torch.cat(hidden) - expected).abs().max()) <= EXACT * scale
    changes, hidden = run_through(calibrated(folder, "w8a8", SMOOTHS))
    assert changes
    assert all("norm" in name for name in changes)
    assert float((torch.cat(hidden) - expected).abs().max()) <= EXACT * scale


def test_a_norm_that_more_than_linear_layers_read_keeps_its_scales(
    make_model: MakeModel, full_precision: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model("Bloom", n_layer=2, apply_residual_connection_post_layernorm=True)
    changes, hidden = run_through(calibrated(folder, "int4", SMOOTHS))
    assert not changes
    assert "layers.0.input_norm is read by more than linear layers: no scales are moved from it" in caplog.text
    expected = expected_hidden(folder)
    assert float((torch.cat(hidden) - expected).abs().max()) <= EXACT * float(expected.abs().max())


@pytest.mark.parametrize("scheme", ["int4", "int8", "w8a8", "fp8"])
def test_what_is_written_has_the_values_that_were_found(scheme: Quantization, folder: Path, tmp_path: Path) -> None:
    source = open_unquantized(str(folder))
    walk = calibrated(folder, scheme, Method(smooths=True, compensates=True))
    found: dict[str, Any] = {}
    changes = walk.changes

    def recorded(specs: Any) -> Any:
        result = changes(specs)
        found.update(result)
        return result

    walk.changes = recorded  # type: ignore[method-assign]
    write_quantized(source, tmp_path / "out", scheme_for(source, scheme), walk)
    read = open_source(tmp_path / "out")
    assert len([each for each in found.values() if isinstance(each, RoundedWeight)]) == 2 * 4
    for spec in read.specs:
        stored, change = read.shard(spec, 0, 1), found.get(spec.name)
        right = change.dequantized() if isinstance(change, RoundedWeight) else change
        torch.testing.assert_close(stored, source.shard(spec, 0, 1) if right is None else right, rtol=1e-6, atol=0)


def test_each_method_brings_outputs_nearer(make_model: MakeModel) -> None:
    folder = make_model("Llama", num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    errors = {}
    for method in (Method(), SMOOTHS, COMPENSATES, Method(smooths=True, compensates=True)):
        walk = calibrated(folder, "int4", method)
        run_through(walk)
        errors[method] = walk.errors.relative
    plain = errors[Method()]
    assert errors[SMOOTHS] < plain
    assert errors[COMPENSATES] < 0.9 * plain
    assert errors[Method(smooths=True, compensates=True)] < 0.9 * plain


def test_experts_stay_and_what_calibration_does_not_see_is_rounded_to_nearest(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    folder = make_model("Qwen2Moe", num_hidden_layers=1, **sizes)
    summary = quantize(str(folder), tmp_path / "out", QuantizeOptions("int4", samples=SAMPLES))
    assert summary.kept_experts
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    experts = [name for name in before if re.search(r"\.experts\.\d", name)]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)
    assert (
        "no sample was seen to go through layers.0.experts.shared.down.weight, which is rounded to near" in caplog.text
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in stories(40, seed=9)))
    return path


def test_the_command_ends_with_a_table(
    tiny_bloom: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny_bloom), "--scheme", "int4", "--device", "cpu"]
    chosen = ["--calibration", str(texts), "--num-samples", "24"]
    assert main([*command, *chosen, str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"12 weights in int4, .*; error of the linear layers' outputs \d+\.\d\d% of their root mean", out)
    assert "The model on 16 other texts of the file" in out
    assert re.search(r"perplexity +\d+\.\d{4} +\d+\.\d{4}", out)
    assert re.search(r"last words right +\d+\.\d\d% +\d+\.\d\d%", out)
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(stories(60, seed=3)))
    pieces = ["--calibration", str(plain), "--sequence-length", "40", "--method", "gptq", "--evaluate", "2"]
    assert main([*command, *pieces, str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert "The model on 2 of the calibration texts themselves: there are no others" in out
    assert "last words" not in out


@pytest.fixture
def bad_files(tmp_path: Path) -> dict[str, Path]:
    contents = {"empty": " \n\n", "few": '{"text": "Anna walked home"}\n' * 3, "broken": '{"text": 1}\n'}
    contents["many"] = contents["few"] * 6
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return {name: tmp_path / name for name in (*contents, "missing")}


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int4", ["--method", "gptq"], "method gptq needs --calibration FILE, a text file or JSON lines with"),
        (
            "w8a8",
            ["--method", "awq", "--calibration", "few"],
            "method awq is for int4 and int8, whose activations stay",
        ),
        (
            "int4",
            ["--method", "smoothquant+gptq", "--calibration", "few"],
            "is for w8a8 and fp8, whose activations are",
        ),
        ("int8", ["--method", "rtn", "--calibration", "few"], "method rtn reads no calibration texts: leave"),
        (
            "int4",
            ["--calibration", "few"],
            "3 samples are too few to calibrate with; give at least 16, and better some",
        ),
        ("int4", ["--calibration", "empty"], "empty holds no text"),
        ("int4", ["--calibration", "broken"], 'broken, line 1: not an object with a string "text"'),
        ("int4", ["--calibration", "missing"], "missing: No such file or directory"),
        ("int4", ["--calibration", "few", "--sequence-length", "1"], "--sequence-length must be at least 2, got 1"),
        ("int4", ["--evaluate", "-1", "--calibration", "few"], "error: --evaluate must be 0 or more, got -1"),
        ("int4", ["--num-samples", "8"], "--num-samples is for calibration: give --calibration as well, or leave it"),
        (
            "int4",
            ["--method", "awq", "--dampening", "0.1", "--calibration", "many"],
            "error: dampening is of gptq, and the method is awq",
        ),
        ("int3", [], "invalid choice: 'int3'"),
        ("int4", ["--method", "hqq"], "invalid choice: 'hqq'"),
    ],
)
def test_bad_input_is_one_line(
    scheme: str,
    options: list[str],
    message: str,
    tiny_bloom: Path,
    bad_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(bad_files.get(option, option)) for option in options]
    command = ["quantize", str(tiny_bloom), str(tmp_path / "out"), "--scheme", scheme, *given]
    try:
        status = main(command)
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_dampening_and_models_are_checked(tiny_bloom: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^dampening must be between 0 and 1, got 2.0$"):
        quantize(str(tiny_bloom), tmp_path / "out", QuantizeOptions("int4", samples=SAMPLES, dampening=2.0))
    for ids in ([], [4, 10_000]):
        with pytest.raises(ConfigError, match=r"^a sample is empty or has tokens outside the vocabulary of \d+; are"):
            quantize(str(tiny_bloom), tmp_path / "out", QuantizeOptions("int4", samples=[*SAMPLES, ids]))
    encoder = save_encoder(tmp_path / "encoder", "Bert", num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match=r"^BertModel generates no text, and only models that do are calibrated"):
        quantize(str(encoder), tmp_path / "out", QuantizeOptions("int4", samples=[[5, 6]] * 16))
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_inputs_that_are_not_finite_are_named(tiny_bloom: Path, tmp_path: Path) -> None:
    walk = calibrated(tiny_bloom, "int4", COMPENSATES)
    parts = list(parts_of(walk._source.specs))
    walk.changes(parts[0])
    walk._hidden[0] = torch.full_like(walk._hidden[0], float("nan"))
    with pytest.raises(CheckpointError, match=r"^what layers.0.attention.qkv.weight reads has NaN or infinity"):
        walk.changes(parts[1])
