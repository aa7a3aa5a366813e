import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.cli.main import build_parser
from hasten.cli.serve import serve_options

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten


def test_a_plan_for_a_gpu_names_what_serves_the_model(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here("plan", tiny_bloom, "--gpu", "L4", "--gpus", "4", "--context", "100")
    assert (done.status, done.err) == (0, "")
    assert f"{tiny_bloom}: BloomForCausalLM, fp32, on L4\n" in done.out
    assert "decode, batch 64" in done.out
    assert done.out.splitlines()[-1] == f"options: hasten serve {tiny_bloom}"
    arguments = build_parser().parse_args(done.out.splitlines()[-1].split()[2:])
    assert arguments.model == str(tiny_bloom)


def test_the_command_of_a_plan_is_quoted_for_a_shell(tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path) -> None:
    folder = tmp_path / "a model; it's here"
    folder.symlink_to(tiny_bloom)
    done = hasten_here("plan", folder, "--gpu", "L4")
    last = done.out.splitlines()[-1].removeprefix("options: ")
    assert shlex.split(last) == ["hasten", "serve", str(folder)]


def test_the_command_of_a_plan_has_all_that_it_was_made_for(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    options = ("-dt", "bf16", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.5", "--kv-cache-dtype", "fp8")
    done = hasten_here("plan", tiny_bloom, "--gpu", "L4", *options, "--max-model-len", "64")
    words = shlex.split(done.out.splitlines()[-1].removeprefix("options: hasten "))
    engine = serve_options(build_parser().parse_args(words)).engine
    assert engine is not None
    assert (engine.dtype, engine.scheduler.max_num_seqs, engine.scheduler.max_model_len) == ("bf16", 8, 64)
    assert (engine.cache.gpu_memory_utilization, engine.cache.kv_cache_dtype) == (0.5, "fp8")


def test_a_plan_as_json(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here("plan", tiny_bloom, "--gpu", "h100", "--json", "-tp", "2", "--quantization", "int8")
    found = json.loads(done.out)
    assert found["fits"]
    assert found["command"] == f"hasten serve {tiny_bloom} --tensor-parallel-size=2 --quantization=int8"
    assert sum(found["weights"].values()) == found["weight_bytes"]
    assert [step["batch"] for step in found["decode"]] == [1, 16, 64, 256]
    assert [fit["ranks"] for fit in found["by_ranks"]] == [1, 2, 4, 8]


def test_what_does_not_fit_is_status_1(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here("plan", tiny_bloom, "--gpu", "L4", "--gpu-memory", "500MiB")
    assert done.status == 1
    assert done.out.splitlines()[-1].startswith("it does not fit; ")


def test_bad_input_is_status_2(tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path) -> None:
    for options, message in (
        (("--gpu", "K80"), "is not known; use one of"),
        (("--cpu", "--gpus", "2"), "--gpus and --gpu-memory are of GPUs"),
        (("--gpu", "L4", "-tp", "3"), "does not divide"),
        (("--gpu", "L4", "-tp", str(10**9)), "does not divide"),
    ):
        done = hasten_here("plan", tiny_bloom, *options)
        assert (done.status, done.out) == (2, "")
        assert message in done.err
    assert hasten_here("plan", tmp_path, "--gpu", "L4").status == 2
    (file := tmp_path / "file").touch()
    assert hasten_here("plan", file).err == f"hasten: error: {file} is a file; give the folder of a checkpoint\n"


def test_a_host_may_have_any_number_of_gpus(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here("plan", tiny_bloom, "--gpu", "L4", "--gpus", 10**9, "--json")
    assert [fit["ranks"] for fit in json.loads(done.out)["by_ranks"]] == [1, 2, 4, 8]
