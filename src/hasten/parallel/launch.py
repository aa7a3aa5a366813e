"""How ranks come to be: started by this process, or by torchrun, mpirun or a cluster's operator; and how they end.

Whoever starts them, every rank runs the same program, and rank 0 is the one that the user talks to. The death of a rank
ends the others: the collective that waits for it fails, and rank 0 says who it was.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed offers them, but its types do not

from hasten.core.config import ParallelConfig
from hasten.core.errors import EngineError, HastenError, RankError, error_of, exit_status
from hasten.parallel.groups import ALONE, ParallelGroups, PipelineGroup, TensorGroup
from hasten.parallel.pipeline import StageLink
from hasten.parallel.rank import RankInfo
from hasten.parallel.threads import limit_threads

_GRACE_S = 2.0
"""How long a failure may take to be explained by the rank that caused it."""
_UNNOTICED_S = 5.0
"""After which this process ends where a collective has not noticed a rank's death: a busy machine takes long to."""
_START_TIMEOUT_S = 120.0
_IDLE_TIMEOUT = timedelta(days=365)
"""How long a collective waits: ranks wait in one for the next request, however long that takes."""


@dataclass(frozen=True)
class Failure:
    """Why a rank has ended before its time."""

    text: str
    """The rank, and how it ended."""
    error: HastenError | None = None
    """The error that the rank reported, if any rank could have it, such as bad input: it is what the user shall see."""

    @property
    def shown(self) -> HastenError:
        """What rank 0 raises."""
        return self.error or RankError(self.text)


def reported(error: BaseException) -> bytes:
    """An error as a rank reports it to the others; `_failure` reads it."""
    return json.dumps([type(error).__name__, str(error)]).encode()


def _failure(where: str, report: bytes) -> Failure:
    """What a rank's report says; `where` names the rank and how it ended."""
    kind, message = json.loads(report)
    error = error_of(kind, message)
    return Failure(f"{where}: {kind}: {message}", None if isinstance(error, EngineError) else error)


class Ranks:
    """The group of this process's run: its collectives, and the word of any rank's death."""

    def __init__(
        self,
        place: RankInfo | None,
        children: "Children | None",
        device_kind: str,
        parallel: ParallelConfig | None = None,
    ) -> None:
        """`parallel`: how many pipeline stages the ranks form, with which layers; None: one."""
        self.world = TensorGroup(place.rank, place.size) if place else ALONE
        self.groups = ParallelGroups(world=self.world, tensor=self.world)
        self.local_size = place.local_size if place else 1
        """Ranks on this host, those of other engines of the same server included."""
        self.engines = place.engines if place else 1
        """Engines that share this host."""
        self.first = place.first if place else 0
        """Rank 0's number among the ranks on this host."""
        self._place = place
        self._children = children
        self._store: PrefixStore | None = None
        self._sent: deque[tuple[Tensor, list[dist.Work | None]]] = deque()
        """Published parts that may be under way, which must stay in memory."""
        self._threads = limit_threads()
        self._most_under_way = 0
        """Parts of messages that other ranks may not have received yet: with several stages on a CPU ranks compute
        before they receive again. Elsewhere they receive at once, and who does not is dead."""
        if place is not None and place.size > 1:
            self._join(place, device_kind)
            if parallel is not None and parallel.pipeline_parallel_size > 1:
                if device_kind == "cpu":
                    self._most_under_way = 2 * parallel.pipeline_parallel_size + _MOST_UNDER_WAY
                self.groups = self._form_stages(parallel)
        if self.local_size > 1 and device_kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, self._threads // self.local_size))

    def _join(self, place: RankInfo, device_kind: str) -> None:
        timeout = timedelta(seconds=_START_TIMEOUT_S)
        hosts_store = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        with self.guard("meeting the other ranks"):
            store = TCPStore(
                place.address, place.port, place.size, hosts_store, timeout=timeout, wait_for_workers=False
            )
            self._store = PrefixStore("hasten", store)
            self._store.set(f"here/{place.rank}", "1")
            self._await_all(f"here/{rank}" for rank in range(place.size))
            backend = "cpu:gloo,cuda:nccl" if device_kind == "cuda" else "gloo"
            # NCCL 2.28 registers buffers of sums that are captured, and the graph then hangs from 2 MB on.
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
            if not dist.is_initialized():
                # A group that failed while it was built has used a number up. Groups meet by their numbers: with
                # another one here than in the other ranks, which are new processes, all would wait for ever.
                dist.distributed_c10d._world.group_count = 0
            dist.init_process_group(
                backend, store=self._store, rank=place.rank, world_size=place.size, timeout=_IDLE_TIMEOUT
            )

    def _form_stages(self, parallel: ParallelConfig) -> ParallelGroups:
        """The groups of this rank where there are several stages: the last one has the ranks from 0 on.

        So rank 0, which schedules, has the logits. All ranks make all groups, in the same order.
        """
        stages, world = parallel.pipeline_parallel_size, self.world
        size = world.size // stages
        ranks_of = [list(range((stages - 1 - stage) * size, (stages - stage) * size)) for stage in range(stages)]
        stage, rank = stages - 1 - world.rank // size, world.rank % size
        tensor = TensorGroup(rank, size, first=ranks_of[stage][0])
        if size > 1:
            handles = [dist.new_group(ranks, timeout=_IDLE_TIMEOUT) for ranks in ranks_of]
            tensor = replace(tensor, handle=handles[stage])
        columns = [list(column) for column in zip(*ranks_of, strict=True)]
        both = [[dist.new_group(column, timeout=_IDLE_TIMEOUT) for _ in range(2)] for column in columns]
        hidden, tokens = both[rank]
        link = StageLink(columns[rank], stage, hidden, tokens)
        pipeline = PipelineGroup(stage, stages, parallel.dealt_layers, link)
        return ParallelGroups(world=world, tensor=tensor, pipeline=pipeline)

    @property
    def store(self) -> PrefixStore | None:
        """Where the ranks of this run leave words for each other; None for a rank alone."""
        return self._store

    def _await_all(self, keys: Iterator[str]) -> None:
        assert self._store is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        waiting = list(keys)
        while waiting:
            waiting = [key for key in waiting if not self._store.check([key])]
            if self._children is not None and self._children.failure is not None:
                raise RuntimeError("a rank died while starting")
            if time.monotonic() > deadline:
                missing = ", ".join(key.removeprefix("here/") for key in waiting)
                raise EngineError(f"ranks {missing} did not appear within {_START_TIMEOUT_S:.0f} s")
            if waiting:
                time.sleep(0.01)

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Turn the failure of a collective into the error of the rank that died, or a RankError that names the rank."""
        if self._children is not None:
            self._children.raise_failure()
            self._children.guarded = True
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if self.world.size == 1:
                raise
            failure = self._explain(error)
            raise failure.error or RankError(f"{failure.text} (while {doing})") from error
        finally:
            if self._children is not None:
                self._children.guarded = False

    def _explain(self, error: Exception) -> Failure:
        if self._children is not None:
            self._children.wait_for_failure(_GRACE_S)
            if self._children.failure is not None:
                return self._children.failure
        elif self._store is not None:
            return self._explain_by_roll_call(error)
        return Failure(f"rank {self.world.rank} of {self.world.size} failed: {_brief(error)}")

    def report_failure(self, error: BaseException) -> None:
        """Tell the other ranks why this one is about to end."""
        if self._store is not None and self._children is None:
            with suppress(RuntimeError):
                self._store.set(f"failed/{self.world.rank}", reported(error).decode())

    def _explain_by_roll_call(self, error: Exception) -> Failure:
        """Who is missing among ranks that nobody here started: those that answer are alive."""
        assert self._store is not None
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        try:
            self._store.set(f"alive/{self.world.rank}", "1")
            deadline = time.monotonic() + _GRACE_S
            while time.monotonic() < deadline:
                for rank in others:
                    if self._store.check([f"failed/{rank}"]):
                        return _failure(f"rank {rank} of {self.world.size} failed", self._store.get(f"failed/{rank}"))
                time.sleep(0.1)
            dead = [rank for rank in others if not self._store.check([f"alive/{rank}"])]
        except RuntimeError:
            dead = [0]  # the store went with the rank that hosts it
        names = ", ".join(f"rank {rank}" for rank in dead) or "a rank"
        return Failure(
            f"{names} of {self.world.size} died: its connection to rank {self.world.rank} broke ({_brief(error)})"
        )

    def broadcast(self, message: object | None) -> object:
        """Rank 0's message, any JSON value, on every rank."""
        if self.world.size == 1:
            return message
        body = json.dumps(message).encode() if self.world.rank == 0 else b""
        length = torch.tensor(len(body))
        dist.broadcast(length, 0)
        whole = torch.frombuffer(bytearray(body or bytes(int(length))), dtype=torch.uint8)
        dist.broadcast(whole, 0)
        return json.loads(bytes(whole.numpy()))

    def publish(self, numbers: NDArray[np.int32]) -> None:
        """Send whole numbers to the other ranks, which `receive` them; on rank 0."""
        first = torch.zeros(_FIRST_NUMBERS, dtype=torch.int32)
        first[0] = len(numbers)
        first[1 : 1 + len(numbers)] = torch.from_numpy(numbers[: _FIRST_NUMBERS - 1])
        parts = [first]
        if len(numbers) >= _FIRST_NUMBERS:
            parts.append(torch.from_numpy(numbers[_FIRST_NUMBERS - 1 :].copy()))
        for part in parts:
            self._sent.append((part, [dist.isend(part, rank) for rank in range(1, self.world.size)]))
        while len(self._sent) > self._most_under_way:
            self._await_sent(self._sent.popleft()[1])

    def publish_end(self) -> None:
        """Let the other ranks end, whose next `receive` gets no numbers; returns once they have all been sent."""
        if self.world.size > 1:
            self.publish(np.empty(0, dtype=np.int32))
        for _, works in self._sent:
            self._await_sent(works)
        self._sent.clear()

    def _await_sent(self, works: "list[dist.Work | None]") -> None:
        """Wait until the other ranks have a part."""
        for work in works:
            assert work is not None, "every rank is in the group"
            work.wait()

    def receive(self) -> NDArray[np.int32]:
        """The numbers that rank 0 published next; on the others."""
        first = torch.empty(_FIRST_NUMBERS, dtype=torch.int32)
        dist.recv(first, 0)
        count = int(first[0])
        if count < _FIRST_NUMBERS:
            return first[1 : 1 + count].numpy()
        rest = torch.empty(count - _FIRST_NUMBERS + 1, dtype=torch.int32)
        dist.recv(rest, 0)
        return torch.cat((first[1:], rest)).numpy()

    def expect_end(self) -> None:
        """From now on the other ranks end because they were told to."""
        if self._children is not None:
            self._children.ending = True

    def abandon(self) -> None:
        """End this process's part after a failure, without waiting for what the other ranks may still owe."""
        everyone = dist.group.WORLD
        if everyone is not None and torch.cuda.is_initialized():
            for group in list(dist.distributed_c10d._world.pg_map):
                with suppress(RuntimeError):
                    group._get_backend(torch.device("cuda")).abort()
        self.leave()

    def leave(self) -> None:
        """End this process's part; the other ranks must leave as well."""
        if self._place is not None and self._place.size > 1:
            with suppress(RuntimeError):
                dist.destroy_process_group()
        if self.local_size > 1:
            torch.set_num_threads(self._threads)
        if self._children is not None:
            self._children.end()


def _brief(error: Exception) -> str:
    """The part of a collective's error that says what happened."""
    return str(error).partition(". This is typically")[0].rpartition("] ")[2].strip()


_FIRST_NUMBERS = 2048
"""Numbers of the first part of a message, with its length: most messages fit."""
_MOST_UNDER_WAY = 16
"""Parts of messages, besides two for each stage, that other ranks may not have received yet."""


class Children:
    """Ranks 1 and up, started by this process as children that end with it."""

    def __init__(self, module: str, configuration: str, place: RankInfo) -> None:
        self.failure: Failure | None = None
        """The first death that nobody asked for."""
        self.guarded = False
        """Whether rank 0 is inside a collective, where it may hang when a child dies."""
        self._failed = threading.Event()
        self.ending = False
        """Whether the children end because they were told to."""
        self._size = place.size
        self._processes = [self._start(module, configuration, place, rank) for rank in range(1, place.size)]

    def _start(self, module: str, configuration: str, place: RankInfo, rank: int) -> "subprocess.Popen[bytes]":
        reader, writer = os.pipe()
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(place.size),
            "LOCAL_RANK": str(place.first + rank),
            "LOCAL_WORLD_SIZE": str(place.local_size),
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // place.local_size)),
            "MASTER_ADDR": place.address,
            "MASTER_PORT": str(place.port),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(writer)],
            stdin=subprocess.PIPE,
            env=environment,
            pass_fds=[writer],
            start_new_session=True,  # Ctrl-C goes to rank 0 alone, which ends the others in order
        )
        os.close(writer)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # of a rank that has died already, which is noticed below
            process.stdin.write(configuration.encode() + b"\n")
            process.stdin.flush()
        threading.Thread(target=self._watch, args=(process, rank, os.fdopen(reader, "rb")), daemon=True).start()
        return process

    def _watch(self, process: "subprocess.Popen[bytes]", rank: int, errors: IO[bytes]) -> None:
        with errors:
            report = errors.read()
        code = process.wait()
        if self.ending or self.failure is not None:
            return
        where = f"rank {rank} of {self._size} (process {process.pid}) died"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.failure = _failure(where, report) if report else Failure(f"{where}: {how}")
        self._failed.set()
        time.sleep(_UNNOTICED_S)
        if self.guarded and not self.ending:
            # What waits for the rank did not notice: NCCL waits for ever, and so does gloo for a rank that died
            # before it was ready to receive. Nothing else would end this process.
            error = self.failure.shown
            sys.stderr.write(f"hasten: error: {error}\n")
            sys.stderr.flush()
            os._exit(exit_status(error))

    def raise_failure(self) -> None:
        """The error of a rank that has died, or a RankError that names the rank."""
        if self.failure is not None:
            raise self.failure.shown

    def wait_for_failure(self, seconds: float) -> None:
        """Wait until a death is known, at most so long."""
        self._failed.wait(seconds)

    def end(self) -> None:
        """Let the children leave, and end those that do not."""
        self.ending = True
        for process in self._processes:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
