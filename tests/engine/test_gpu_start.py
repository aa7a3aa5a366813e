"""Starts on a real GPU: what each compiles, in a process of its own without kernels, and how weights come."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.waiting import LIMIT_S

from hasten import LLM, SamplingParams
from hasten.core import gpu_weights
from hasten.core.gpu_weights import Arrived, CudaDriver, GpuWeights

pytestmark = pytest.mark.gpu

SMALL: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 8, "max_model_len": 256, "kv_cache_memory": 1 << 27}
DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"deterministic": True}], ids=str)
def test_all_kernels_of_common_requests_are_compiled_together(options: dict[str, Any], tmp_path: Path) -> None:
    program = Path(__file__).with_name("start_child.py")
    options |= {"dtype": "fp16", "max_num_seqs": 32, "max_model_len": 512, "kv_cache_memory": 1 << 28}
    done = subprocess.run(
        [sys.executable, str(program), str(DEMO), json.dumps(options)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["start"], found["requests"]) == ([], [])


def started(dtype: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The weights of a program's engine, copied to the host, and tokens that it computes."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    with LLM(DEMO, device="cuda", dtype=dtype, **SMALL) as llm:
        weights = {name: each.cpu() for name, each in llm.engine.worker.runner.model.named_parameters()}
        return weights, llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("piece", [gpu_weights._PIECE, 10_000], ids=["at once", "in pieces"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_weights_of_a_program_are_those_of_its_files(dtype: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the driver they are bit for bit what torch copies to the GPU, and the memory is free again at the end."""
    monkeypatch.setattr(gpu_weights, "_PIECE", piece)
    arrived: list[str] = []
    take = GpuWeights.take

    def noted(self: GpuWeights, path: Path, name: str) -> Arrived | None:
        found = take(self, path, name)
        if found is not None:
            arrived.append(name)
        return found

    monkeypatch.setattr(GpuWeights, "take", noted)
    held: set[int] = set()
    allocate, free = CudaDriver.allocate, CudaDriver.free

    def noted_allocate(self: CudaDriver, nbytes: int) -> int:
        held.add(address := allocate(self, nbytes))
        return address

    def noted_free(self: CudaDriver, address: int) -> None:
        held.remove(address)
        free(self, address)

    monkeypatch.setattr(CudaDriver, "allocate", noted_allocate)
    monkeypatch.setattr(CudaDriver, "free", noted_free)
    directly, tokens = started(dtype)
    gc.collect()
    assert not held  # what other processes have of the GPU's memory changes meanwhile, so that is not compared
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        assert sorted(arrived) == sorted(file.keys())
    with monkeypatch.context() as patch:
        patch.setattr("hasten.engine.model_loading.begun", lambda *_: None)
        arrived.clear()
        by_torch, expected = started(dtype)
    assert not arrived
    assert tokens == expected
    assert directly.keys() == by_torch.keys()
    assert all(torch.equal(each, by_torch[name]) for name, each in directly.items())


def test_weights_that_a_process_began_to_read_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine's process of `hasten serve` does, which begins before it has torch."""
    expected, tokens = started("fp32")
    gpu_weights.BEGUN.expect()
    gpu_weights.BEGUN.begin(DEMO)
    monkeypatch.setattr("hasten.engine.model_loading.begun", None)  # nothing more is begun
    found, same = started("fp32")
    assert same == tokens
    assert all(torch.equal(each, expected[name]) for name, each in found.items())
