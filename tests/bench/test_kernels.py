"""The cases run on Triton's interpreter at the size of a very small model; times are made up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten import ops
from hasten.bench import kernel_cases, kernels
from hasten.bench.kernel_cases import TOLERANCE, Case, Setting, cases, model_shape
from hasten.bench.kernels import Ceilings, Result
from hasten.cli.main import main
from hasten.core.errors import ConfigError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.ops.partial_sum import PartialSum

pytest.importorskip("triton")

import tests.interpreter  # noqa: F401  # kernels run on it where there is no GPU
from tests.bench.compile_cases import launchers

from hasten.ops.gpu import cuts

WITHOUT_KERNEL = {"gated_pairs", "linear_into", "pack_experts", "pack_linear", "takes_pairs"}
"""Launchers of `ops/gpu` without a kernel of theirs: what an op chooses by, or computes with; a library's product."""
MOST = Ceilings(4e12, 800e12)
TINY = ModelConfig(
    architecture="BloomForCausalLM",
    num_layers=1,
    hidden_size=128,
    intermediate_size=512,
    vocab_size=300,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_size=64),
)
TOO_LARGE = (
    *("512 rows", "int8, 64 rows", "int8, 128 rows", "8, 16 rows", "w8a8, 64", "w8a8, 256", "fp8, 64", "fp8, 256"),
    *("16 x", "64 x", "256 x", "256 of", "256 rows of", "prefill", "8192"),
    *("int4, 64", "int4, 256"),
)
"""What takes the interpreter seconds."""


def tiny(dtype: torch.dtype = torch.float16) -> Setting:
    return Setting(TINY, dtype, torch.device("cpu"))


def named(name: str) -> Case:
    return next(case for case in cases(tiny()) if case.name == name)


def test_every_launcher_of_a_kernel_is_measured() -> None:
    assert {case.op for case in cases(tiny())} == set(launchers()) - WITHOUT_KERNEL


def test_names_are_told_apart() -> None:
    names = [case.name for case in cases(tiny())]
    assert len(set(names)) == len(names)


SMALL = [case.name for case in cases(tiny()) if not any(size in case.shape for size in TOO_LARGE)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command itself does this on a GPU")
@pytest.mark.parametrize("name", SMALL)
def test_kernels_agree_with_their_definitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op, launcher in launchers().items():
        if callable(getattr(ops, op, None)):
            monkeypatch.setattr(ops, op, launcher)
    monkeypatch.setattr(cuts, "BLOCK", 512)
    torch.manual_seed(0)
    case = named(name)
    call = case.make()
    limit = TOLERANCE[torch.float16] if case.tolerance is None else case.tolerance
    assert kernels.largest_error(call.kernel(), call.exact()) <= limit
    expected = call.exact()
    assert kernels.largest_error(call.reference(), expected) <= max(limit, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "shared_memory"),
    [("90", "bf16", 227 * 1024), ("80", "fp16", 163 * 1024)],
    ids=["H100 and H200, bf16", "A100, fp16"],
)
def test_kernels_compile_for_gpus_that_are_not_here(
    capability: str, dtype: str, shared_memory: int, tmp_path: Path
) -> None:
    """The interpreter takes much that a GPU's compiler refuses, and knows no limit of memory."""
    program = Path(__file__).with_name("compile_cases.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), capability, dtype],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DISABLE_LINE_INFO": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {
        "skinny",
        "one_query",
        "query_group",
        "_tile",
        "_add_norm",
        "_gate",
        "_grouped_down",
        "_store_heads",
        "_edit",
        "_draw",
        "_amounts",
        "_collect",
    } <= {kernel["kernel"] for kernel in compiled}
    assert max(kernel["shared"] for kernel in compiled) <= shared_memory


def test_inputs_that_take_turns_differ() -> None:
    case = named("norm 64 rows")
    sums = [call.kernel.args[0] for call in (case.make(), case.make())]  # type: ignore[attr-defined]
    assert all(isinstance(sum_, PartialSum) for sum_ in sums)
    assert not torch.equal(sums[0].parts, sums[1].parts)


def test_what_is_moved_and_computed() -> None:
    linear = named("linear up, 8 rows")
    assert linear.nbytes == 2 * (8 * (128 + 512) + 128 * 512)
    assert linear.flops == 2 * 8 * 128 * 512
    decode = named("paged_attention 16 x 192")
    assert decode.nbytes == 2 * 2 * 16 * (1 + 192) * 128
    assert decode.flops == 4 * 16 * 192 * 128
    prefill = named("paged_attention prefill 14 x 560")
    assert prefill.flops == 4 * 14 * (560 * 561 // 2) * 128


def test_errors_are_relative_above_one_and_nan_is_the_worst() -> None:
    expected = torch.tensor([0.5, 100.0])
    assert kernels.largest_error(torch.tensor([0.25, 100.0]), expected) == 0.25
    assert kernels.largest_error(torch.tensor([0.5, 101.0]), expected) == pytest.approx(0.01)
    assert kernels.largest_error(torch.tensor([0.5, float("nan")]), expected) == float("inf")
    infinite = torch.tensor([float("-inf"), 1.0])
    assert kernels.largest_error(infinite, infinite) == 0
    assert kernels.largest_error(-infinite, infinite) == float("inf")
    assert kernels.largest_error(expected, infinite) == float("inf")
    assert kernels.largest_error(expected.expand(2, 1, 2), 2 * expected.unsqueeze(0)) == 0
    assert kernels.largest_error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert kernels.largest_error((expected, expected), (expected, 2 * expected)) == 0.5


def test_sizes_of_models(tiny_bloom: Path) -> None:
    assert model_shape("bloom-7b1").hidden_size == 4096
    assert model_shape("bloom").attention.num_heads == 112
    assert model_shape("llama-3-8b").attention.num_kv_heads == 8
    mixture = model_shape("qwen3-30b-a3b").experts
    assert mixture is not None
    assert mixture.num_experts == 128
    assert model_shape(str(tiny_bloom)).hidden_size == 64
    with pytest.raises(ConfigError, match="no-such is no folder of a model, and none of bloom-560m, "):
        model_shape("no-such")


def made_up(case: Case, error: float = 1e-4) -> Result:
    return kernels.result(case, 20e-6, 30e-6, error, MOST, torch.float16)


def test_rates_follow_from_the_time_and_the_nearer_ceiling_counts() -> None:
    linear = made_up(named("linear up, 8 rows"))
    assert linear.bytes_per_second == pytest.approx(2 * (8 * 640 + 128 * 512) / 20e-6)
    assert linear.flops_per_second == pytest.approx(2 * 8 * 128 * 512 / 20e-6)
    assert linear.share == pytest.approx(linear.bytes_per_second / 4e12)
    prefill = made_up(named("paged_attention prefill 4 x 2048"))
    assert prefill.share == pytest.approx(prefill.flops_per_second / 800e12)
    assert made_up(named("greedy 1 row of 300"), error=0).is_exact
    assert not made_up(named("greedy 1 row of 300"), error=1e-3).is_exact


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that takes as long for everything, and that gets one matrix product wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        kernel_cases, "gpu_setting", lambda model, dtype: Setting(TINY, torch.float16, torch.device("cpu"))
    )
    monkeypatch.setattr(kernels, "ceilings", lambda setting: MOST)
    monkeypatch.setattr(
        kernels, "measure", lambda case, setting, most: made_up(case, 0.5 if "up, 16" in case.name else 0)
    )


@pytest.mark.usefixtures("made_up_gpu")
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--only", "greedy"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("bloom-7b1 in fp16 on a GPU: 4.00 TB/s and 800 TFLOP/s at most\n")
    (line,) = [line for line in out.splitlines() if "greedy 64 rows of 300" in line]
    assert line.split()[5:] == ["20.0", "30.0", "1.50", "0.00", "0.0", "0%", "0.0e+00"]
    assert "linear" not in out


@pytest.mark.usefixtures("made_up_gpu")
def test_json_and_a_wrong_result_is_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--json", "--output-path", str(path)]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads(path.read_text())
    assert report["device"] == "a GPU"
    assert report["most"] == {"bytes_per_second": 4e12, "flops_per_second": 800e12}
    assert len(report["results"]) == len(cases(tiny()))
    assert report["results"][0]["seconds"] == 20e-6
    assert captured.err == "hasten: linear up, 16 rows: error 5.0e-01, above 2.0e-03\n"


@pytest.mark.usefixtures("made_up_gpu")
def test_a_name_of_no_kernel_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--only", "gemm"]) == 2
    assert (
        "no kernel is called 'gemm'; there are choose_beams, copy_blocks, count_tokens, draw" in capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels"]) == 2
    assert capsys.readouterr().err == "hasten: error: kernels are measured on a GPU, and torch finds none here\n"


@pytest.mark.gpu
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--model-shape", "bloom-560m", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {result["op"] for result in results} == set(launchers()) - WITHOUT_KERNEL
    assert all(result["seconds"] > 0 for result in results)


def test_nothing_but_torch_is_imported_to_measure() -> None:
    script = (
        "import sys, torch, hasten.bench.kernel_cases as k, hasten.bench.kernels;"
        "k.cases(k.Setting(k.model_shape('bloom-7b1'), torch.half, torch.device('cpu')));"
        "print({'transformers', 'tokenizers', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
