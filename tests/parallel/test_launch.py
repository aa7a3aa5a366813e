"""Ranks of real processes: the same tokens as one rank, and an end with a name when one dies."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch.distributed as dist
from tests.conftest import MakeBloom
from tests.waiting import LIMIT_S, eventually
from torch._C._distributed_c10d import TCPStore  # torch.distributed offers it, but its types do not

from hasten import LLM, SamplingParams
from hasten.core.errors import CapacityError, ChecksumError, ConfigError, EngineError, RankError
from hasten.core.ports import free_port
from hasten.parallel.liveness import failure_of, reported
from hasten.parallel.rank import RankInfo, free_local_port, rank_from_environment

HOST = socket.gethostname()
PROMPTS = [[5 + (7 * i + j) % 200 for j in range(3 + 9 * i)] for i in range(5)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=20, seed=7, n=2, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=1, logprobs=1, ignore_eos=True),
    SamplingParams(temperature=1.1, top_p=0.9, seed=8, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=10, ignore_eos=True),
]


def hasten(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hasten", *arguments]


def endless(model: Path) -> list[str]:
    """A generation that goes on for longer than any test waits."""
    return hasten("generate", str(model), "--prompt", "the", "--max-new-tokens", "100000", "--ignore-eos", "--stream",
                  "--json", "--max-model-len", "200000", "--device", "cpu")  # fmt: skip


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is surely gone afterwards."""
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children_of(parent: int) -> list[int]:
    """Processes that it has started; not those that multiprocessing leaves running once a test has used it."""
    found = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it may have ended since
            if not re.search(rb"resource_tracker|forkserver", Path(f"/proc/{child}/cmdline").read_bytes()):
                found.append(int(child))
    return found


def runs(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    try:
        return "zombie" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_first_output(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline(), process.communicate()[1]


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error, which must come within the limit."""
    error = process.communicate(timeout=LIMIT_S)[1]
    return process.returncode, error


def mpi_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What Open MPI's mpirun tells its processes, and a port that no other test has."""
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_choose_the_tokens_of_one_rank(tiny_bloom_odd_vocab: Path, ranks: int) -> None:
    options: dict[str, Any] = {"device": "cpu", "max_num_batched_tokens": 40, "max_num_seqs": 4}
    with LLM(tiny_bloom_odd_vocab, **options) as alone:
        expected = alone.generate(PROMPTS, PARAMS)
    with LLM(tiny_bloom_odd_vocab, tensor_parallel_size=ranks, **options) as llm:
        found = llm.generate(PROMPTS, PARAMS)
        again = llm.generate(PROMPTS, PARAMS)
        assert llm.engine.scheduler.blocks.num_used == 0
    for each, other, third in zip(expected, found, again, strict=True):
        tokens = [completion.token_ids for completion in each.outputs]
        assert [completion.token_ids for completion in other.outputs] == tokens
        assert [completion.token_ids for completion in third.outputs] == tokens
    assert found[2].prompt_logprobs is not None
    assert len(found[2].prompt_logprobs) == len(PROMPTS[2])


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
def test_ranks_agree_through_preemption(tiny_bloom: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(tiny_bloom, device="cpu") as alone:
        expected = [output.outputs[0].token_ids for output in alone.generate(PROMPTS, params)]
        block_bytes = alone.engine.worker.runner.block_bytes
    tight: dict[str, Any] = {
        "max_model_len": 96,
        "kv_cache_memory": 4 * block_bytes,
    }  # 8 blocks, since each rank's are half as large
    with LLM(tiny_bloom, device="cpu", tensor_parallel_size=2, **tight) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]
        assert llm.engine.scheduler.stats.preemptions > 0
    assert found == expected


@pytest.mark.any_python
def test_ranks_that_mpirun_started_join_and_the_first_alone_prints(tiny_bloom: Path) -> None:
    command = hasten("generate", str(tiny_bloom), "--prompt", "the river", "--json", "--device", "cpu")
    single = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout)
    port = free_port()
    with (
        running(command, **mpi_environment(0, 2, port)) as first,
        running(command, **mpi_environment(1, 2, port)) as second,
    ):
        out, error = first.communicate(timeout=LIMIT_S)
        assert first.returncode == 0, error
        assert json.loads(out)["token_ids"] == single["token_ids"]
        assert second.communicate(timeout=LIMIT_S) == ("", "")
        assert second.returncode == 0


PROGRAM = """
import sys
from hasten import LLM, SamplingParams, run_worker

model = sys.argv[1]
if run_worker(model, device="cpu"):
    print("computed")
else:
    with LLM(model, device="cpu") as llm:
        print(llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].token_ids)
"""


@pytest.mark.any_python
def test_a_program_of_several_ranks_has_its_llm_on_the_first_alone(tiny_bloom: Path) -> None:
    with LLM(tiny_bloom, device="cpu") as llm:
        output = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))[0]
    command = [sys.executable, "-c", PROGRAM, str(tiny_bloom)]
    port = free_port()
    with (
        running(command, **mpi_environment(0, 2, port)) as first,
        running(command, **mpi_environment(1, 2, port)) as second,
    ):
        assert first.communicate(timeout=LIMIT_S) == (f"{output.outputs[0].token_ids}\n", "")
        assert second.communicate(timeout=LIMIT_S) == ("computed\n", "")
        assert (first.returncode, second.returncode) == (0, 0)


def test_an_llm_on_another_rank_is_refused(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mpi_environment(1, 2, 9).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"this process is rank 1 of 2, .* call hasten\.run_worker\(model, \.\.\.\)"):
        LLM(tiny_bloom)


def test_a_killed_rank_ends_the_run_with_its_name(tiny_bloom: Path) -> None:
    with running([*endless(tiny_bloom), "--tensor-para-size", "2"]) as process:
        await_first_output(process)
        (child,) = children_of(process.pid)
        os.kill(child, signal.SIGKILL)
        code, error = end_of(process)
    assert code == 1
    assert f"rank 1 of 2 on {HOST} (process {child}) died: killed by SIGKILL" in error


def test_a_killed_first_rank_takes_the_others_along(tiny_bloom: Path) -> None:
    with running([*endless(tiny_bloom), "--tensor-para-size", "2"]) as process:
        await_first_output(process)
        (child,) = children_of(process.pid)
        process.kill()
        eventually(lambda: not runs(child))


@pytest.mark.any_python
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_of_mpirun_name_the_one_that_was_killed(tiny_bloom: Path, victim: int) -> None:
    port = free_port()
    with (
        running(endless(tiny_bloom), **mpi_environment(0, 2, port)) as first,
        running(endless(tiny_bloom), **mpi_environment(1, 2, port)) as second,
    ):
        await_first_output(first)
        processes = (first, second)
        processes[victim].kill()
        code, error = end_of(processes[1 - victim])
    assert code == 1
    assert f"rank {victim} of 2 on {HOST} died" in error


def test_an_error_of_one_rank_alone_reaches_the_user(tiny_bloom: Path, tmp_path: Path) -> None:
    from hasten.checkpoint.convert import Conversion, convert

    others = children_of(os.getpid())  # other tests' engines
    convert(Conversion(str(tiny_bloom), str(tmp_path), ranks=2, format="safetensors"))
    (file,) = (tmp_path / "2-gpu").glob("rank-00001-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ChecksumError, match="rank-00001"):
        LLM(tmp_path, tensor_parallel_size=2, device="cpu")
    assert set(children_of(os.getpid())) <= set(others)
    with pytest.raises(ChecksumError):
        LLM(tmp_path, device="cpu")


RANK_ZERO_COMES_LAST = """
import sys
from hasten.cli.main import main
from hasten.engine import worker

with_folders = worker.with_folders

def after_another_died(config, ranks):
    found = with_folders(config, ranks)
    if ranks._children is not None:
        assert ranks.liveness.await_failure(100), "no rank has died"
        ranks.broadcast("by one that is gone")
    return found

worker.with_folders = after_another_died
sys.exit(main(sys.argv[1:]))
"""
"""The command, with a rank 0 whose next collective comes once another rank has died."""


@pytest.mark.any_python
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_bad_input_is_one_line_and_status_2_whichever_rank_finds_it_first(make_bloom: MakeBloom, ranks: int) -> None:
    folder = make_bloom(n_head=5, hidden_size=40)
    argv = ["generate", str(folder), "--prompt", "the", "--device", "cpu", "-tp", str(ranks)]
    expected = (
        f"hasten: error: tensor parallel size {ranks} does not divide attention heads (5); "
        "choose a size that does: 1, 5\n"
    )
    for command in ([sys.executable, "-m", "hasten"], [sys.executable, "-c", RANK_ZERO_COMES_LAST]):
        done = subprocess.run([*command, *argv], capture_output=True, text=True, check=False, timeout=LIMIT_S)
        assert (done.returncode, done.stderr) == (2, expected)


def test_what_no_rank_could_foresee_names_the_rank() -> None:
    found = failure_of("rank 1 of 2 died", reported(ZeroDivisionError("a bug")))
    assert (found.error, str(found.shown)) == (None, "rank 1 of 2 died: ZeroDivisionError: a bug")
    assert isinstance(found.shown, RankError)
    found = failure_of("rank 1 of 2 died", reported(CapacityError("too little memory\nfor é")))
    assert isinstance(found.shown, CapacityError)
    assert str(found.shown) == "too little memory\nfor é"


def test_ranks_need_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> socket.socket:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    assert free_local_port() > 0
    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(ConfigError, match=r"meet at 127\.0\.0\.1, which cannot be reached here \(Network is unre"):
        free_local_port()


def test_ranks_meet_after_a_start_that_failed(tiny_bloom: Path) -> None:
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistError):  # the other rank never comes
        dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.2))
    with LLM(tiny_bloom, tensor_parallel_size=2, device="cpu") as llm:
        with pytest.raises(ConfigError, match=r"^this process is a rank of another group already"):
            LLM(tiny_bloom, tensor_parallel_size=2, device="cpu")
        assert len(llm.generate([[5, 6]], PARAMS[0])[0].outputs[0].token_ids) == 12


def test_a_rank_that_dies_before_it_is_ready_ends_the_call_alone(tiny_bloom: Path) -> None:
    others = children_of(os.getpid())
    for dies in (True, False):  # the program goes on with another LLM
        with LLM(tiny_bloom, tensor_parallel_size=2, device="cpu") as llm:
            assert len(llm.generate([[5, 6]], PARAMS[0])[0].outputs[0].token_ids) == 12
            if not dies:
                continue
            (child,) = set(children_of(os.getpid())) - set(others)
            os.kill(child, signal.SIGSTOP)  # it neither receives nor ends
            Timer(0.5, os.kill, (child, signal.SIGKILL)).start()
            end = rf"rank 1 of 2 on {HOST} \(process {child}\) died: killed by SIGKILL"
            with pytest.raises(RankError, match=end):
                llm.generate("the")
            with pytest.raises(EngineError, match=end):
                llm.generate("the")
        assert set(children_of(os.getpid())) <= set(others)


def test_the_place_of_a_rank_comes_from_whoever_started_it() -> None:
    assert rank_from_environment({}) is None
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "77"}
    assert rank_from_environment(torchrun) == RankInfo(1, 4, 2, "node", 77)
    assert rank_from_environment(mpi_environment(0, 2, 9)) == RankInfo(0, 2, 2, "127.0.0.1", 9)
    assert rank_from_environment({"PMI_RANK": "2", "PMI_SIZE": "3", "MASTER_PORT": "5"}) == RankInfo(
        2, 3, 3, "127.0.0.1", 5
    )
    pod = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert rank_from_environment(pod) == RankInfo(1, 2, 1, "job-master-0", 23456)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"}
    assert rank_from_environment(alone) is None
    assert rank_from_environment({**alone, **mpi_environment(1, 2, 9)}) == RankInfo(1, 2, 2, "127.0.0.1", 9)
    assert rank_from_environment({**mpi_environment(0, 1, 9), **torchrun}) == RankInfo(1, 4, 2, "node", 77)
    same_job = [rank_from_environment({"PMI_RANK": rank, "PMI_SIZE": "2", "PMI_KVSNAME": "a"}) for rank in "01"]
    assert same_job[0] is not None
    assert same_job[1] is not None
    assert same_job[0].port == same_job[1].port
    several_hosts = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        rank_from_environment(several_hosts)
    with pytest.raises(ConfigError, match="RANK='one'"):
        rank_from_environment({"RANK": "one", "WORLD_SIZE": "2"})


def test_a_size_that_contradicts_the_launcher_is_refused(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mpi_environment(0, 2, 9).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4, but this is one of 2 ranks"):
        LLM(tiny_bloom, tensor_parallel_size=4)


def test_an_interrupt_ends_all_ranks(tiny_bloom: Path) -> None:
    with running([*endless(tiny_bloom), "--tensor-para-size", "2"]) as process:
        await_first_output(process)
        (child,) = children_of(process.pid)
        process.send_signal(signal.SIGINT)
        code, _ = end_of(process)
    assert code == 130
    eventually(lambda: not runs(child))
