"""How ranks find each other's mailboxes; the mailboxes themselves need two GPUs (tests/ops/gpu/test_exchange.py)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.waiting import LIMIT_S
from torch._C._distributed_c10d import HashStore, PrefixStore

from hasten.parallel.liveness import Liveness
from hasten.parallel.peers import RunStore


def exchange(store: PrefixStore, rank: int, first: int) -> list[bytes]:
    """What the other rank of two wrote in three rounds, with keys as torch writes them from `first` on."""
    received = []
    for number in range(first, first + 3):
        store.set(f"CUDASymmetricMemory/{number}/{rank}", f"{number - first} of {rank}")
        other = f"CUDASymmetricMemory/{number}/{1 - rank}"
        store.wait([other])
        received.append(store.get(other))
    return received


@pytest.mark.parametrize("firsts", [(0, 0), (3, 0), (0, 5), (9, 12)])
def test_processes_that_counted_differently_before_find_each_other(firsts: tuple[int, int]) -> None:
    run = HashStore()
    renumbered = [RunStore(run, Liveness()) for _ in firsts]
    stores = [PrefixStore("run", each) for each in renumbered]  # as in torch: C++ calls the methods
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(exchange, stores[rank], rank, firsts[rank]) for rank in range(2)]
        assert [each.result(timeout=LIMIT_S) for each in found] == [
            [b"0 of 1", b"1 of 1", b"2 of 1"],
            [b"0 of 0", b"1 of 0", b"2 of 0"],
        ]


def test_other_keys_are_left_as_they_are() -> None:
    run = HashStore()
    RunStore(run, Liveness()).set("barrier", b"reached")
    assert run.get("barrier") == b"reached"
