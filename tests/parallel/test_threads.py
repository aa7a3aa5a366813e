import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten.parallel import threads
from hasten.parallel.threads import ThreadChoice, limit_threads

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


def test_steps_take_the_number_of_threads_that_is_faster_lately() -> None:
    before, now = torch.get_num_threads(), 0.0
    seconds = {3: 1.0, 1: 2.0}
    choice = ThreadChoice(lambda: now)

    def threads_of(steps: int, tokens: int = 16) -> list[int]:
        nonlocal now
        taken = []
        for _ in range(steps):
            with choice.step(tokens):
                taken.append(torch.get_num_threads())
                now += seconds[taken[-1]]
            assert torch.get_num_threads() == 3
        return taken

    try:
        torch.set_num_threads(3)
        assert threads_of(8) == [3, 1] * 4
        assert threads_of(64) == [3] * 63 + [1]
        seconds[3] = 20.0  # another program has come
        taken = threads_of(200)
        assert taken[-50:].count(1) >= 49
        seconds[3] = 1.0  # and gone
        assert threads_of(3000)[-60:].count(3) >= 59
        assert threads_of(2, tokens=1024) == [3, 1], "of other steps nothing is known"
        torch.set_num_threads(1)
        with choice.step(16):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
