"""Ranks on two hosts, whoever says which is which; and the end of a host."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.parallel.test_launch import HOST, children_of, end_of, endless, running
from tests.parallel.two_hosts import two_hosts

from hasten import LLM, SamplingParams
from hasten.core.errors import ConfigError
from hasten.core.parallel_config import ParallelConfig
from hasten.core.ports import free_port
from hasten.parallel.rank import RankInfo, on_several_hosts, rank_info

LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "pod-0.svc"}
PET = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "pod-0.svc", "PET_MASTER_PORT": "77"}
PODS = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "pod-0.svc", "MASTER_PORT": "77"}
TORCHRUN = {**PODS, "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}
MEET = {"MASTER_ADDR": "pod-0.svc", "MASTER_PORT": "77"}
FOUR = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)


def on(rank: int = 2, port: int = 77, *, starts_node: bool = True, local_size: int = 2) -> RankInfo:
    return RankInfo(rank, 4, local_size, "pod-0.svc", port, starts_node=starts_node)


@pytest.mark.any_python
@pytest.mark.parametrize(
    ("parallel", "env", "expected"),
    [
        (FOUR, {}, None),
        (FOUR, LWS, on(port=29500)),
        (FOUR, PET, on()),
        (FOUR, PODS, on()),
        (FOUR, LWS | PET, on(port=29500)),
        (FOUR, TORCHRUN, on(3, starts_node=False)),
        (ParallelConfig(), TORCHRUN | LWS | PET, on(3, starts_node=False)),
        (FOUR, MPIRUN | MEET, on(3, starts_node=False)),
        (FOUR, MPICH | MEET, on(3, starts_node=False)),
        (ParallelConfig(), LWS, None),
        (ParallelConfig(), PODS, RankInfo(1, 2, 1, "pod-0.svc", 77)),
        (ParallelConfig(tensor_parallel_size=2), PODS, RankInfo(1, 2, 1, "pod-0.svc", 77)),
        (ParallelConfig(tensor_parallel_size=2, nnodes=1), LWS, None),
        (ParallelConfig(tensor_parallel_size=4, nnodes=2, node_rank=1, master_addr="pod-0.svc"), {}, on(port=29500)),
        (ParallelConfig(tensor_parallel_size=4, nnodes=2, node_rank=0, master_port=5), PET, on(0, 5)),
    ],
)
def test_whoever_started_a_process_says_which_rank_it_is(
    parallel: ParallelConfig, env: dict[str, str], expected: RankInfo | None
) -> None:
    assert rank_info(parallel, env) == expected
    assert on_several_hosts(env) == (
        not env.keys() & {"LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} and env != {}
    )


@pytest.mark.any_python
@pytest.mark.parametrize(
    ("parallel", "env", "message"),
    [
        (ParallelConfig(node_rank=1), {}, "node_rank is for ranks on several hosts; give nnodes as well"),
        (
            ParallelConfig(tensor_parallel_size=2, nnodes=2, node_rank=1),
            {},
            r"nnodes is 2: give node_rank \(0 to 1\) and master_addr \(the host of node 0\) as well",
        ),
        (
            ParallelConfig(tensor_parallel_size=2, nnodes=2, node_rank=2, master_addr="a"),
            {},
            r"node 2 is none of 2 \(nnodes 2\), which are numbered from 0",
        ),
        (
            ParallelConfig(tensor_parallel_size=3, nnodes=2, node_rank=1, master_addr="a"),
            {},
            r"tensor_parallel_size 3 times pipeline_parallel_size 1 is 3 ranks, which nnodes 2 does not divide; .*",
        ),
        (
            ParallelConfig(tensor_parallel_size=3),
            LWS,
            r".* 3 ranks, which LWS_GROUP_SIZE=2 does not divide; choose a multiple, or nnodes 1 for ranks on this .*",
        ),
        (
            FOUR,
            LWS | PET | {"PET_NODE_RANK": "0"},
            "the environment has LWS_GROUP_SIZE=2 for host 1, but PET_NNODES=2 for host 0; unset what is wrong, .*",
        ),
        (
            ParallelConfig(tensor_parallel_size=3, nnodes=3, node_rank=1, master_addr="a"),
            LWS,
            "nnodes is 3, but the environment has LWS_GROUP_SIZE=2; leave nnodes out",
        ),
        (
            ParallelConfig(tensor_parallel_size=4, nnodes=2, node_rank=1, master_addr="a"),
            TORCHRUN,
            "nnodes is 2, but torchrun, mpirun or a cluster started this process as rank 3 of 4 already; leave .*",
        ),
        (FOUR, TORCHRUN | {"RANK": "4"}, "the environment has RANK=4, which is none of WORLD_SIZE=4 ranks"),
    ],
)
def test_what_contradicts_itself_is_refused(parallel: ParallelConfig, env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        rank_info(parallel, env)


@pytest.mark.any_python
def test_two_hosts_of_two_ranks_and_the_end_of_one(tiny_bloom: Path) -> None:
    with LLM(tiny_bloom, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        expected = llm.generate("the", params)[0].outputs[0].token_ids
    with ExitStack() as stack:
        hosts, port = stack.enter_context(two_hosts()), free_port()
        meet = ["--nnodes", "2", "--master-addr", hosts[0].address, "--master-port", str(port), "--node-rank"]
        command = [*endless(tiny_bloom), "-tp", "2", "-pp", "2", *meet]
        first, second = (
            stack.enter_context(running([*host.prefix, *command, str(rank)])) for rank, host in enumerate(hosts)
        )
        assert first.stdout is not None
        found: list[int] = []
        while len(found) < len(expected):
            line = first.stdout.readline()
            assert line, first.communicate()[1]
            found = json.loads(line)["token_ids"]
        assert found[: len(expected)] == expected
        if hosts[1].is_apart:
            hosts[1].cut_off()
        else:
            os.kill(children_of(second.pid)[0], signal.SIGKILL)
        ends = [end_of(process) for process in (first, second)]
        assert [code for code, _ in ends] == [1, 1]
        assert f"of 4 on {HOST}" in ends[0][1]
        assert "does not answer" in ends[0][1] or "broke" in ends[0][1]
        assert "of 4 on" in ends[1][1]
