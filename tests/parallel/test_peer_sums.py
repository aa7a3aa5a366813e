"""Sums of many rows over two ranks: as threads, where a rank waits as a GPU would, and on two GPUs.

Run as a program, this file is one rank of the test on GPUs.
"""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.waiting import LIMIT_S
from torch import Tensor

from hasten import ops
from hasten.core.ports import free_port
from hasten.layers.linear import RowLinear
from hasten.ops import PartialSum, reference
from hasten.parallel.groups import TensorGroup
from hasten.parallel.peer_ring import RingMemory
from hasten.parallel.peer_sums import SLOTS, PeerSums

FEW, MOST, WIDTH = 4, 40, 6
GPU_LIMIT_S = 100


def both(abort_flag: Tensor) -> list[PeerSums]:
    """Two ranks."""
    nbytes = RingMemory.nbytes(SLOTS, MOST * WIDTH * torch.float32.itemsize)
    memory = [RingMemory.of(torch.zeros(nbytes, dtype=torch.uint8), SLOTS) for _ in range(2)]
    return [PeerSums(memory[rank], memory[1 - rank], FEW, abort_flag) for rank in range(2)]


def test_few_rows_and_more_than_a_slot_has_room_for_take_another_way() -> None:
    sums, row_bytes = both(torch.zeros(1, dtype=torch.int32))[0], WIDTH * 4
    taken = [rows for rows in range(60) if sums.takes(rows, row_bytes)]
    room = sums._own.slots.shape[1] // row_bytes
    assert taken == list(range(FEW + 1, room + 1))


def part_into(part: Tensor) -> Callable[[Tensor], None]:
    def write(out: Tensor) -> None:
        out.copy_(part)

    return write


@pytest.mark.parametrize("slow", [0, 1, None])
def test_whoever_is_fast_both_ranks_get_the_others_part_of_every_sum(slow: int | None) -> None:
    abort_flag = torch.zeros(1, dtype=torch.int32)
    ranks, sizes = both(abort_flag), [random.Random(0).randint(FEW + 1, MOST) for _ in range(60)]

    def value(rank: int, number: int, rows: int) -> Tensor:
        return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH) + 1000 * number + 7 * rank

    def run(rank: int) -> None:
        rng = random.Random(rank)
        for number, rows in enumerate(sizes):
            part = value(rank, number, rows)
            if rank == slow or (slow is None and rng.random() < 0.5):
                time.sleep(rng.choice([0, 0.001]))
            own, theirs = ranks[rank].exchanged(rows, WIDTH, torch.float32, part_into(part))
            assert torch.equal(own, part)
            assert torch.equal(theirs, value(1 - rank, number, rows))
            if rng.random() < 0.3:
                time.sleep(0.001)
            assert torch.equal(theirs, value(1 - rank, number, rows)), "overwritten while it is read"

    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(run, rank) for rank in range(2)]
        try:
            for future in done:
                future.result(timeout=LIMIT_S)
        finally:
            abort_flag.fill_(1)


class Meeting(TensorGroup):
    """A rank of two that are threads."""

    barrier = threading.Barrier(2)

    def least(self, number: int) -> int:
        self.barrier.wait(LIMIT_S)
        return number


@pytest.mark.parametrize("wrong", [False, True])
def test_a_rank_finds_out_at_the_start_whether_it_reads_what_was_written(wrong: bool) -> None:
    ranks = both(torch.zeros(1, dtype=torch.int32))
    if wrong:  # as stale lines of a cache would be
        stale = torch.zeros_like(ranks[0]._other.slots)
        ranks[0]._other = replace(ranks[0]._other, slots=stale)
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(ranks[rank].reads_right, Meeting(rank, 2)) for rank in range(2)]
        assert [each.result(timeout=LIMIT_S) for each in found] == [not wrong, True]


def test_a_rank_that_failed_is_not_waited_for() -> None:
    sums = both(torch.ones(1, dtype=torch.int32))[0]
    _, theirs = sums.exchanged(FEW + 1, WIDTH, torch.float32, lambda out: None)
    assert theirs.shape == (FEW + 1, WIDTH)


@pytest.mark.parametrize("rows", [FEW + 1, 33])
def test_a_row_linear_leaves_both_ranks_parts_to_the_norm(rows: int) -> None:
    abort_flag = torch.zeros(1, dtype=torch.int32)
    ranks, inner = both(abort_flag), 10
    torch.manual_seed(0)
    weight, bias, x = torch.randn(WIDTH, 2 * inner), torch.randn(WIDTH), torch.randn(rows, 2 * inner)
    residual = torch.randn(rows, WIDTH)

    def run(rank: int) -> PartialSum:
        layer = RowLinear(2 * inner, WIDTH, group=TensorGroup(rank, 2, sums=ranks[rank]))
        shard = slice(rank * inner, (rank + 1) * inner)
        layer.weight, layer.bias = (torch.nn.Parameter(each, requires_grad=False) for each in (weight[:, shard], bias))
        layer.pack()
        with torch.inference_mode():
            found = layer(x[:, shard].contiguous(), residual)
        assert isinstance(found, PartialSum)
        assert not found.over_ranks
        return found

    with ThreadPoolExecutor(2) as threads:
        found = [each.result(timeout=LIMIT_S) for each in [threads.submit(run, rank) for rank in range(2)]]
    whole = x @ weight.T + bias + residual
    totals = [reference.complete(each) for each in found]
    assert torch.equal(*totals)
    torch.testing.assert_close(totals[0], whole)
    torch.testing.assert_close(ops.norm(found[0], bias, bias, 1e-5)[1], whole)


@pytest.mark.multi_gpu
def test_ranks_on_gpus_of_their_own() -> None:
    root = Path(__file__).parents[2]
    program = [sys.executable, "-m", "tests.parallel.test_peer_sums", str(free_port())]
    ranks = [
        subprocess.Popen([*program, str(rank)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=GPU_LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert printed == ["", ""]
    assert [rank.returncode for rank in ranks] == [0, 0]


def run_rank(port: int, rank: int) -> None:
    """Products and norms one behind another; ends with an error if a sum is wrong or differs from the other's."""
    import torch.distributed as dist

    from hasten.parallel.launch import Ranks
    from hasten.parallel.peers import connect_sums
    from hasten.parallel.rank import RankInfo

    device, width, inner = torch.device("cuda", rank), 1024, 2048
    torch.cuda.set_device(device)
    ranks = Ranks(RankInfo(rank, 2, 2, "127.0.0.1", port), None, "cuda")
    assert ranks.store is not None
    aborted = torch.zeros(1, dtype=torch.int32).pin_memory()
    sums = connect_sums(ranks.store, ranks.world, 8192 * width * 2, 256, device, aborted)
    assert sums is not None, "these GPUs cannot write each other's memory"
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float16) / 8

    weight, bias, residual, x = draw(width, 2 * inner), draw(width), draw(8192, width), draw(8192, 2 * inner)
    layer = RowLinear(2 * inner, width, group=replace(ranks.world, sums=sums))
    shard = slice(rank * inner, (rank + 1) * inner)
    layer.weight, layer.bias = (torch.nn.Parameter(each, requires_grad=False) for each in (weight[:, shard], bias))
    layer.pack()
    with torch.inference_mode():
        kept = []
        for number, rows in enumerate([8192, 257, 300, 2048, 5000, 8191, 1023, 8192] * 12):
            if number // 5 % 3 == rank:
                torch.cuda._sleep(2_000_000)
            normed, total = ops.norm(layer(x[:rows, shard].contiguous(), residual[:rows]), bias, bias, 1e-5)
            kept.append((rows, normed, total) if number % 7 == 0 else (rows, normed[:9].clone(), total[:9].clone()))
        for rows, normed, total in kept:
            for found in (normed, total):
                others = found.clone()
                dist.broadcast(others, 0)
                assert torch.equal(others, found), f"the ranks differ in {rows} rows"
            exact = x[: len(total)].double() @ weight.double().T + bias.double() + residual[: len(total)].double()
            error = (total.double() - exact).abs().max()
            assert error <= 4e-3, f"error {error:.1e} in {rows} rows"
    torch.cuda.synchronize(device)
    dist.all_reduce(torch.zeros(1))  # the other may still write to this one's memory
    ranks.leave()


if __name__ == "__main__":
    run_rank(*map(int, sys.argv[1:]))
