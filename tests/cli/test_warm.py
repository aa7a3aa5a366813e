import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hasten import ops

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

CONFIG = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 32, "n_layer": 2, "n_head": 4}


ONE_TOKEN = """
import sys
from hasten import LLM, SamplingParams
with LLM(sys.argv[1], device="cpu", load_format="dummy", kv_cache_memory="1M", progress_bars=False) as llm:
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False))
    print(len(output.outputs[0].token_ids), "numba" in sys.modules)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 64}))
    return tmp_path


def options(model: Path) -> tuple[object, ...]:
    return (model, "--device", "cpu", "--kv-cache-memory", "1M", "--max-num-seqs", "32")


def test_requests_of_all_kinds_need_a_config_alone(hasten_here: "Hasten", model: Path) -> None:
    done = hasten_here("warm", *options(model))
    assert (done.status, done.err) == (0, "")
    first, second = done.out.splitlines()
    pattern = r"started in \d+\.\d s, computed 375 requests of all kinds in \d+\.\d s on the CPU"
    assert re.fullmatch(pattern, first)
    assert second == f"kernels in {ops.kept_kernels()}"


@pytest.mark.parametrize(
    ("mode", "why"),
    [(0o777, "other users can write to it"), (0o700, "it cannot be written, or its disk is full")],
)
def test_kernels_that_cannot_be_kept_are_an_error(
    hasten_here: "Hasten", model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, why: str
) -> None:
    ops.records()  # which has compiled all that there is, and writes no more
    folder = tmp_path / "cache" / "hasten" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = hasten_here("warm", *options(model))
    assert done.status == 2
    wanted = f"kernels were not kept in {folder}: {why}; set XDG_CACHE_HOME to a folder of your own with room"
    assert done.err == f"hasten: error: {wanted}\n"


@pytest.mark.any_python
def test_a_start_behind_it_compiles_nothing(model: Path, tmp_path: Path) -> None:
    """As in an image whose last layer is a folder of kernels."""
    cache = tmp_path / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    warmed = run("-m", "hasten", "warm", *options(model))
    kernels = cache / "hasten" / "kernels"
    assert warmed.splitlines()[1] == f"kernels in {kernels}"
    (folder,) = kernels.iterdir()
    assert folder.name.endswith("-fp32"), "no others are needed"
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert "attention.o" in before
    assert run("-c", ONE_TOKEN, model).split() == ["2", "False"], "two tokens, and no compiler was imported"
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
