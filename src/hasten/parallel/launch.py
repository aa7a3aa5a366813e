"""Start and end of ranks, whether this process, torchrun, mpirun or a cluster's operator starts them.

Every rank runs the same program, and rank 0 serves the caller. The death of a rank ends the others (`liveness.py`), and
rank 0 reports which one died.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import py_object, pythonapi
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed offers them, but its types do not

from hasten.core.errors import ConfigError, RankError
from hasten.core.parallel_config import ParallelConfig
from hasten.parallel.children import Children
from hasten.parallel.control import Hub, Spoke, await_host, interface_of
from hasten.parallel.groups import ALONE, ParallelGroups, PipelineGroup, TensorGroup
from hasten.parallel.liveness import Failure, Liveness, failure_of, rank_name, reported
from hasten.parallel.pipeline import StageLink
from hasten.parallel.rank import LOCAL, RankInfo
from hasten.parallel.threads import limit_threads

JOIN_TIMEOUT_S = 120.0
"""How long ranks wait for each other to appear."""
_RETRY_S = 0.2
_INTERFACE = "GLOO_SOCKET_IFNAME"
_IDLE_TIMEOUT = timedelta(days=365)
"""How long a collective waits: as long as all ranks are alive, however long one of them computes."""


def check_no_group() -> None:
    """ConfigError where torch has a group of all ranks in this process already, of which there can be one."""
    if dist.is_initialized():
        raise ConfigError(
            "this process is a rank of another group already (another LLM of several ranks, or the program's own use "
            "of torch.distributed); close that first, or use a process of its own"
        )


class Ranks:
    """The group of this process's run: its collectives, and the word of any rank's death."""

    def __init__(
        self,
        info: RankInfo | None,
        children: Children | None,
        device_kind: str,
        parallel: ParallelConfig | None = None,
    ) -> None:
        """`parallel`: how many pipeline stages the ranks form, with which layers; None: one."""
        self.liveness = Liveness() if children is None else children.liveness
        self.world = TensorGroup(info.rank, info.size, liveness=self.liveness) if info else ALONE
        self.groups = ParallelGroups(world=self.world, tensor=self.world)
        self.local_size = info.local_size if info else 1
        """Ranks on this host, those of other engines of the same server included."""
        self.engines = info.engines if info else 1
        """Engines that share this host."""
        self.first = info.first if info else 0
        """Rank 0's number among the ranks on this host."""
        self._info = info
        self._children = children
        self._store: PrefixStore | None = None
        self._control: Hub | Spoke | None = None
        self._threads = limit_threads()
        if info is not None and info.size > 1:
            self.liveness.on_failure(self._abort_nccl, waits_first=True)
            try:
                with self.guard("meeting the other ranks"):
                    self._connect(info)
                    self.groups = self.liveness.outlive(lambda: self._form_groups(info, device_kind, parallel))
            except BaseException:
                self.abandon()
                raise
        if self.local_size > 1 and device_kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, self._threads // self.local_size))

    def _connect(self, info: RankInfo) -> None:
        """Meet rank 0, which may not be there yet, or be that of a run before, which is about to end."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while True:
            try:
                self._store = self._open_store(info, max(1.0, deadline - time.monotonic()))
                if info.rank == 0:
                    self._control = Hub(info, self._store, self.liveness, JOIN_TIMEOUT_S)
                else:
                    self._control = Spoke(info, self._store, self.liveness)
                return
            except RuntimeError:
                if info.rank == 0 or self.liveness.failure is not None or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)

    def _open_store(self, info: RankInfo, seconds: float) -> PrefixStore:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not info.starts_node
        hosts_store = info.rank == 0 and not agent
        if not hosts_store:
            await_host(info.address, info.port, seconds)
        timeout = timedelta(seconds=seconds)
        listener = _local_listener(info.port) if hosts_store and info.address == LOCAL else None
        store = TCPStore(
            *(info.address, info.port, info.size, hosts_store),
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener,
        )
        # torchrun's own store outlives the ranks that it starts anew.
        return PrefixStore(f"hasten/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _form_groups(self, info: RankInfo, device_kind: str, parallel: ParallelConfig | None) -> ParallelGroups:
        backend = "cpu:gloo,cuda:nccl" if device_kind == "cuda" else "gloo"
        # NCCL 2.28 registers buffers of sums that are captured, and the graph then hangs from 2 MB on.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        if not dist.is_initialized():
            # A group that failed while it was built has used a number up. Groups meet by their numbers: with
            # another one here than in the other ranks, which are new processes, all would wait for ever.
            dist.distributed_c10d._world.group_count = 0
        with _interface(LOCAL if info.address == LOCAL or self._control is None else self._control.address):
            dist.init_process_group(
                backend, store=self._store, rank=info.rank, world_size=info.size, timeout=_IDLE_TIMEOUT
            )
            return self._divided(parallel)

    def _divided(self, parallel: ParallelConfig | None) -> ParallelGroups:
        stages = 1 if parallel is None else parallel.pipeline_parallel_size
        return self.groups if parallel is None or stages == 1 else self._form_stages(parallel)

    def _form_stages(self, parallel: ParallelConfig) -> ParallelGroups:
        """The groups of this rank where there are several stages: the last one has the ranks from 0 on.

        So rank 0, which schedules, has the logits. All ranks make all groups, in the same order.
        """
        stages, world = parallel.pipeline_parallel_size, self.world
        size = world.size // stages
        ranks_of = [list(range((stages - 1 - stage) * size, (stages - stage) * size)) for stage in range(stages)]
        stage, rank = stages - 1 - world.rank // size, world.rank % size
        tensor = replace(world, rank=rank, size=size, first=ranks_of[stage][0])
        if size > 1:
            handles = [dist.new_group(ranks, timeout=_IDLE_TIMEOUT) for ranks in ranks_of]
            tensor = replace(tensor, handle=handles[stage])
        columns = [list(column) for column in zip(*ranks_of, strict=True)]
        links = [StageLink.form(column, stage, self.liveness, _IDLE_TIMEOUT) for column in columns]
        pipeline = PipelineGroup(stage, stages, parallel.dealt_layers, links[rank])
        return ParallelGroups(world=world, tensor=tensor, pipeline=pipeline)

    @property
    def store(self) -> PrefixStore | None:
        """Where the ranks of this run leave words for each other; None for a rank alone."""
        return self._store

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """End waits once a rank has died, with the error that it reported or a RankError that names it."""
        with self.liveness.guarded():
            try:
                yield
            except (RuntimeError, dist.DistError) as error:
                if self.world.size == 1:
                    raise
                failure = self.liveness.await_failure() or Failure(f"{self._name} failed: {_brief(error)}")
                raise failure.error or RankError(f"{failure.text} (while {doing})") from error

    @property
    def _name(self) -> str:
        return rank_name(self.world.rank, self.world.size)

    def report_failure(self, error: BaseException) -> None:
        """Let the other ranks know why this one is about to end, unless another one's death is why."""
        if self._control is not None and self.liveness.failure is None:
            self.liveness.ending = True
            self._control.report(failure_of(f"{self._name} failed", reported(error)))

    def broadcast(self, message: object | None) -> object:
        """Rank 0's message, any JSON value, on every rank."""
        if self.world.size == 1:
            return message
        if isinstance(self._control, Hub):
            self._control.publish(json.dumps(message).encode())
            return message
        return json.loads(self._received())

    def publish(self, numbers: NDArray[np.int32]) -> None:
        """Send whole numbers to the other ranks, which `receive` them; on rank 0."""
        assert isinstance(self._control, Hub)
        self._control.publish(numbers.data)

    def receive(self) -> NDArray[np.int32]:
        """The numbers that rank 0 published next, none at the end; on the others."""
        return np.frombuffer(self._received(), dtype=np.int32)

    def _received(self) -> bytes:
        assert isinstance(self._control, Spoke)
        return self._control.receive()

    def publish_end(self) -> None:
        """Let the other ranks end, whose next `receive` gets no numbers."""
        if isinstance(self._control, Hub):
            self._control.report(None)
            self._control.publish(b"")

    def expect_end(self) -> None:
        """From now on the other ranks end because rank 0 ended them."""
        self.liveness.ending = True

    def abandon(self) -> None:
        """End this process's part after a failure, without waiting for what the other ranks may still owe."""
        self._abort_nccl()
        for group in _groups():
            # Its end would wait for what it had begun to send to a rank that is dead.
            pythonapi.Py_IncRef(py_object(group._get_backend(torch.device("cpu"))))
        self.leave()

    def _abort_nccl(self) -> None:
        if torch.cuda.is_initialized():
            for group in _groups():
                with suppress(RuntimeError):
                    group._get_backend(torch.device("cuda")).abort()

    def leave(self) -> None:
        """End this process's part; the other ranks must leave as well."""
        self.liveness.ending = True
        if self._control is not None:
            if dist.is_initialized():
                with suppress(RuntimeError):
                    dist.destroy_process_group()
            self._control.close()
        if self.local_size > 1:
            torch.set_num_threads(self._threads)
        if self._children is not None:
            self._children.end()


def _local_listener(port: int) -> int:
    """A socket for a store that this host alone reaches, which would else listen on every interface; RuntimeError."""
    try:
        return socket.create_server((LOCAL, port)).detach()
    except OSError as error:
        raise RuntimeError(f"cannot listen on {LOCAL}, port {port} ({error.strerror or error})") from error


@contextmanager
def _interface(address: str) -> Iterator[None]:
    """Let gloo listen where the other ranks find this one, which is not always what the host's name stands for."""
    name = interface_of(address)
    if name is None or _INTERFACE in os.environ:
        yield
        return
    os.environ[_INTERFACE] = name
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _groups() -> list[dist.ProcessGroup]:
    """All groups of this process."""
    return list(dist.distributed_c10d._world.pg_map)


def _brief(error: Exception) -> str:
    """The part of a collective's error that says what happened."""
    return str(error).partition(". This is typically")[0].rpartition("] ")[2].strip()
