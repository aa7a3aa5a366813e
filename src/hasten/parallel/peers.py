"""Mailboxes between the GPUs of one host, where they can reach each other."""

import itertools
import logging
import re
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
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

_log = logging.getLogger(__name__)
_numbers = itertools.count()
_TIMEOUT = timedelta(seconds=120)
_POLL_S = 0.005


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


def connect(store: Store, group: TensorGroup, width: int, max_rows: int, device: torch.device) -> Peers | None:
    """Mailboxes for rows of `width` 16-bit values, on every rank; None, on every rank, if any cannot have them.

    The ranks find each other's memory through `store`, which must be this run's own.
    """
    try:
        made = _mailboxes(PrefixStore(f"from {group.first}", store), group, width, max_rows, device)
    except RuntimeError as error:
        made = None
        _log.warning("ranks sum through NCCL alone: %s", str(error).partition("\n")[0])
    # also: nobody writes before all mailboxes are empty
    return made if group.least(int(made is not None)) else None


def _mailboxes(store: Store, group: TensorGroup, width: int, max_rows: int, device: torch.device) -> Peers:
    rank, size = group.rank, group.size
    shape = (2, max_rows, size, width // 2)
    # held here: C++ would not find a dead object's methods
    shared = RunStore(PrefixStore("mailboxes", store), group.liveness)
    mailbox = symmetric_memory.empty(shape, dtype=torch.int64, device=device)
    mailbox.zero_()
    torch.cuda.synchronize(device)
    # Not torch's own name for the group of all ranks: a process may be rank 0 of several runs, one after the other, and
    # torch would look for the first run's store again.
    name: Any = f"hasten-{next(_numbers)}"  # torch 2.13 has a type of its own for it, earlier ones take a string
    # torch 2.13 looks for the name among these stores, 2.11 for a group of that name, of which it takes the store
    named = dist.ProcessGroup(shared, rank, size)
    _SymmetricMemory.set_group_info(name, rank, size, shared)
    _register_process_group(name, named)
    try:
        handle = _SymmetricMemory.rendezvous(mailbox, name)
    finally:
        _unregister_process_group(name)
    addresses = [handle.get_buffer(other, shape, torch.int64).data_ptr() for other in range(size)]
    return Peers(
        rank=rank,
        size=size,
        max_rows=max_rows,
        width=width,
        mailbox=mailbox,
        addresses=torch.tensor(addresses, dtype=torch.int64, device=device),
        exchanges=torch.zeros(max_rows, dtype=torch.int32, device=device),
        abort_flag=torch.zeros(1, dtype=torch.int32).pin_memory(),
    )


def reachable(size: int, local_size: int, first: int = 0) -> bool:
    """Whether all ranks' GPUs, from number `first` on, are on this host and can write each other's memory."""
    if size < 2 or size > local_size or torch.cuda.device_count() < first + size:
        return False
    numbers = range(first, first + size)
    pairs = ((one, other) for one in numbers for other in numbers if one != other)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
