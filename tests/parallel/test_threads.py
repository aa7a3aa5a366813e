import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.waiting import LIMIT_S, attempts

from hasten.parallel import threads
from hasten.parallel.threads import ThreadChoice, limit_threads, waited_for_cpus

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
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": ""}, timeout=LIMIT_S)
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


class Machine:
    """A clock, and steps that take so many seconds on each number of threads and wait for CPUs for a part of them."""

    def __init__(self) -> None:
        self.now, self.waited, self.part = 0.0, 0.0, 0.0
        self.seconds = {3: 1.0, 1: 2.0}
        self.choice = ThreadChoice(lambda: self.now, lambda: self.waited)

    def threads_of(self, steps: int, tokens: int = 16) -> list[int]:
        """How many threads each of some steps is computed on."""
        taken = []
        for _ in range(steps):
            with self.choice.step(tokens):
                threads = torch.get_num_threads()
                taken.append(threads)
                self.now += self.seconds[threads]
                self.waited += self.seconds[threads] * self.part * (threads > 1)
            assert torch.get_num_threads() == 3
            with self.choice.rest_of_step():
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 3
        return taken


@pytest.fixture
def machine() -> Iterator[Machine]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield Machine()
    torch.set_num_threads(before)


def test_a_step_is_computed_on_all_threads_where_no_other_program_runs(machine: Machine) -> None:
    machine.seconds[1], machine.part = 0.1, 0.1
    assert set(machine.threads_of(200)) == {3}


def test_steps_beside_other_programs_take_the_number_of_threads_that_is_faster_lately(machine: Machine) -> None:
    machine.part = 0.5
    assert machine.threads_of(6) == [3, 1, 3, 1, 3, 1]  # the first of them shows that there are others
    assert machine.threads_of(64).count(3) >= 61
    machine.seconds[3] = 20.0
    assert machine.threads_of(200)[-50:].count(1) >= 48
    machine.part, machine.seconds[3] = 0.0, 1.0  # the other programs have ended
    assert set(machine.threads_of(100)[-60:]) == {3}


def test_short_steps_are_judged_together(machine: Machine) -> None:
    machine.seconds, machine.part = {3: 0.01, 1: 0.001}, 0.5
    assert machine.threads_of(8)[:6] == [3, 3, 3, 3, 3, 1]


def test_a_system_counts_how_long_threads_wait_for_a_cpu() -> None:
    before = waited_for_cpus()
    spin = "import time\nend = time.time() + 600\nwhile time.time() < end: pass"
    (cpu, *_) = allowed = os.sched_getaffinity(0)
    with subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", spin]) as other:
        try:
            os.sched_setaffinity(0, {cpu})
            for _ in attempts("a wait of 50 ms"):
                if waited_for_cpus() - before > 0.05:
                    break
        finally:
            os.sched_setaffinity(0, allowed)
            other.kill()


def test_one_thread_stays_one(machine: Machine) -> None:
    torch.set_num_threads(1)
    with machine.choice.step(16):
        assert torch.get_num_threads() == 1
    with machine.choice.rest_of_step():
        assert torch.get_num_threads() == 1
    torch.set_num_threads(3)
