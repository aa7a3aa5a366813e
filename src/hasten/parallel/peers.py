"""Memory that the GPUs of one host share: mailboxes for sums over ranks, and slots for what pipeline stages send."""

import itertools
import logging
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    PrefixStore,
    Store,
    _register_process_group,
    _SymmetricMemory,
    _unregister_process_group,
)

from hasten.ops.peers import Peers
from hasten.parallel.groups import TensorGroup
from hasten.parallel.liveness import Liveness
from hasten.parallel.peer_ring import PeerRing, RingMemory
from hasten.parallel.peer_sums import SLOTS, PeerSums
from hasten.parallel.pipeline import StageLink

_log = logging.getLogger(__name__)

MOST_EXCHANGED_ROWS = 256
"""Rows of one sum over ranks through each other's memory; NCCL is as fast with more."""
_numbers = itertools.count()
_TIMEOUT = timedelta(seconds=120)
_POLL_S = 0.005
_UNREACHABLE = "not all of their GPUs can write each other's memory"


class RunStore(Store):
    """A store through which processes rendezvous that have done so before in other runs, and not equally often.

    torch exchanges memory handles under keys of "prefix/number/rank", and counts the number up for as long as a process
    lives. The process of rank 0 outlives its engine, while each engine starts the other ranks anew: their numbers
    differ by what earlier engines used, and each side would wait for keys that the other never writes. Here numbers
    count from the first that a process uses in this run.
    """

    _KEY = re.compile(r"(.*)/(\d+)/(\d+)")

    def __init__(self, store: Store, liveness: Liveness) -> None:
        super().__init__()
        self._store = store
        self._liveness = liveness
        self._first: dict[str, int] = {}

    def _key(self, key: str) -> str:
        found = self._KEY.fullmatch(key)
        if found is None:
            return key
        prefix, number = found[1], int(found[2])
        return f"{prefix}/{number - self._first.setdefault(prefix, number)}/{found[3]}"

    def set(self, key: str, value: Any) -> None:
        """Write `value` (bytes)."""
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        """The value, once there is one."""
        self.wait([key])
        return self._store.get(self._key(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return once all keys are there; RuntimeError after two minutes, or `timeout`, or if a rank dies."""
        names = [self._key(key) for key in keys]
        deadline = time.monotonic() + (timeout or _TIMEOUT).total_seconds()
        while not self._store.check(names):
            if self._liveness.await_failure(_POLL_S) is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no other rank wrote {', '.join(keys)}")


def connect(
    store: Store, group: TensorGroup, width: int, max_rows: int, device: torch.device, abort_flag: Tensor
) -> Peers | None:
    """Mailboxes for rows of `width` 16-bit values, on every rank; None, on every rank, if any cannot have them.

    The ranks find each other's memory through `store`, which must be this run's own. The host sets `abort_flag`, int32
    [1] of its memory, once a rank has failed.
    """
    shape = (2, max_rows, group.size, width // 2)
    store = PrefixStore(f"from {group.first}", store)
    shared = _shared(store, group.rank, group.size, group.liveness, shape, torch.int64, device)
    # also: nobody writes before all mailboxes are empty
    if not group.least(int(shared is not None)):
        _log.warning("ranks sum through NCCL alone: %s", _UNREACHABLE)
        return None
    assert shared is not None
    return Peers(
        rank=group.rank,
        size=group.size,
        max_rows=max_rows,
        width=width,
        mailbox=shared[group.rank],
        addresses=torch.tensor([each.data_ptr() for each in shared], dtype=torch.int64, device=device),
        exchanges=torch.zeros(max_rows, dtype=torch.int32, device=device),
        abort_flag=abort_flag,
    )


def connect_stages(
    store: Store, world: TensorGroup, link: StageLink, slot_bytes: int, device: torch.device, abort_flag: Tensor
) -> None:
    """Let the stages of `link` write each other's memory, on all ranks of `world`, unless any of them cannot.

    `slot_bytes`: of the largest message. There are as many slots as steps under way, and one more.
    """
    slots, size = len(link.ranks) + 1, len(link.ranks)
    store = PrefixStore(f"stages of {link.ranks[0]}", store)
    shape = (RingMemory.nbytes(slots, slot_bytes),)
    shared = _shared(store, link.stage, size, world.liveness, shape, torch.uint8, device)
    if not world.least(int(shared is not None)):
        _log.warning("pipeline stages send through NCCL: %s", _UNREACHABLE)
        return
    assert shared is not None
    own, before, behind = (RingMemory.of(shared[(link.stage + step) % size], slots) for step in (0, -1, 1))
    link.use(PeerRing(own, before, behind, abort_flag))


def connect_sums(
    store: Store, group: TensorGroup, slot_bytes: int, few: int, device: torch.device, abort_flag: Tensor
) -> PeerSums | None:
    """Where two ranks read each other's parts of sums of more than `few` rows; None, on both, if either cannot.

    `slot_bytes`: of the largest sum.
    """
    assert group.size == 2
    store = PrefixStore(f"sums of {group.first}", store)
    shape = (RingMemory.nbytes(SLOTS, slot_bytes),)
    shared = _shared(store, group.rank, group.size, group.liveness, shape, torch.uint8, device)
    if not group.least(int(shared is not None)):
        _log.warning("sums of many rows go through NCCL: %s", _UNREACHABLE)
        return None
    assert shared is not None
    own, other = (RingMemory.of(shared[rank], SLOTS) for rank in (group.rank, 1 - group.rank))
    sums = PeerSums(own, other, few, abort_flag)
    if not group.least(int(sums.reads_right(group))):
        _log.warning(
            "sums of many rows go through NCCL: GPUs read other numbers from each other than were written there"
        )
        return None
    return sums


def _shared(
    store: Store,
    rank: int,
    size: int,
    liveness: Liveness,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor] | None:
    """Zeros of one shape on each rank's GPU, by rank, as this one sees them; None if it cannot, with a log."""
    try:
        return _rendezvous(store, rank, size, liveness, shape, dtype, device)
    except RuntimeError as error:
        _log.warning("GPUs do not share memory: %s", str(error).partition("\n")[0])
        return None


def _rendezvous(
    store: Store,
    rank: int,
    size: int,
    liveness: Liveness,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    from torch.distributed import _symmetric_memory as symmetric_memory  # 20 ms, which one rank does without

    # held here: C++ would not find a dead object's methods
    renumbered = RunStore(PrefixStore("mailboxes", store), liveness)
    own = symmetric_memory.empty(shape, dtype=dtype, device=device)
    own.zero_()
    torch.cuda.synchronize(device)
    # Not torch's own name for the group of all ranks: a process may be rank 0 of several runs, one after the other, and
    # torch would look for the first run's store again.
    name: Any = f"hasten-{next(_numbers)}"  # torch 2.13 has a type of its own for it, earlier ones take a string
    # torch 2.13 looks for the name among these stores, 2.11 for a group of that name, of which it takes the store
    named = dist.ProcessGroup(renumbered, rank, size)
    _SymmetricMemory.set_group_info(name, rank, size, renumbered)
    _register_process_group(name, named)
    try:
        handle = _SymmetricMemory.rendezvous(own, name)
    finally:
        _unregister_process_group(name)
    return [own if other == rank else handle.get_buffer(other, shape, dtype) for other in range(size)]


def reachable(numbers: Sequence[int]) -> bool:
    """Whether the GPUs of these numbers on this host, two at least, can write each other's memory."""
    if len(numbers) < 2 or torch.cuda.device_count() <= max(numbers):
        return False
    pairs = ((first, second) for first in numbers for second in numbers if first != second)
    return all(torch.cuda.can_device_access_peer(first, second) for first, second in pairs)
