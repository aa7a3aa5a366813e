import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten.parallel import threads
from hasten.parallel.threads import limit_threads

CHECK = """
import sys, torch
from hasten.core import cpus
quota = sys.argv[1]
cpus.available_cpus.__defaults__ = (cpus.Path(quota), cpus.Path(quota, "own"))
torch.set_num_threads(8)
from hasten import LLM
with LLM(sys.argv[2], device="cpu") as llm:
    print(torch.get_num_threads())
with LLM(sys.argv[2], device="cpu", tensor_parallel_size=2) as llm:
    print(torch.get_num_threads(), llm.generate("the")[0].finished)
print(torch.get_num_threads())
"""


@pytest.mark.any_python
def test_an_engine_computes_with_as_many_threads_as_the_quota_has_cpus(tiny_bloom: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    command = [sys.executable, "-c", CHECK, str(tmp_path), str(tiny_bloom)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": ""}, timeout=100)
    assert done.stdout.split() == ["2", "1", "True", "2"]


def test_the_users_number_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "available_cpus", lambda: 1)
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert limit_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert limit_threads() == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
