"""The death of a rank: its description, and how it ends everything that waits for that rank."""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from hasten.core.errors import EngineError, HastenError, RankError, error_of, exit_status

GRACE_S = 2.0
"""How long a death may take to be explained by the process that started the rank, and how long ranks take to end."""
_EXPLAIN_S = 3 * GRACE_S
"""How long a wait that failed looks for the rank that caused it: a busy machine takes long to notice a death."""
_POLL = timedelta(seconds=1)
"""How often a wait on a CPU looks whether all ranks are alive."""
_ABORT_S, _EXIT_S = 1.0, 5.0
"""How long waits may take to end by themselves, before NCCL's groups are aborted, and then before the process ends."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why a rank has ended before its time."""

    text: str
    """The rank, its host, and how it ended."""
    error: HastenError | None = None
    """The error that the rank reported, if any rank could have it, such as bad input: it is what the user shall see."""

    @property
    def shown(self) -> HastenError:
        """What a process raises that waited for the rank."""
        return self.error or RankError(self.text)

    def packed(self) -> bytes:
        """The failure as it is sent to other processes."""
        error = self.error
        return json.dumps([self.text, None if error is None else [type(error).__name__, str(error)]]).encode()

    @classmethod
    def unpacked(cls, data: bytes) -> "Failure":
        """The failure that `packed` described."""
        text, error = json.loads(data)
        return cls(text, None if error is None else error_of(*error))


def reported(error: BaseException) -> bytes:
    """An error as a rank reports it to the process that started it; `failure_of` reads it."""
    return json.dumps([type(error).__name__, str(error)]).encode()


def failure_of(where: str, report: bytes) -> Failure:
    """What a rank's report says; `where` names the rank and how it ended."""
    kind, message = json.loads(report)
    error = error_of(kind, message)
    if isinstance(error, RankError):
        return Failure(message)  # it ended because another one died
    return Failure(f"{where}: {kind}: {message}", None if isinstance(error, EngineError) else error)


def rank_name(rank: int, size: int, host: str | None = None) -> str:
    """How messages call a rank; `host` is this one by default."""
    return f"rank {rank} of {size} on {host or socket.gethostname()}"


class Liveness:
    """Whether all ranks of a run are alive, as far as this process knows, and an end to its waits once one is not."""

    def __init__(self) -> None:
        self.failure: Failure | None = None
        """The first death that nobody asked for."""
        self.ending = False
        """Whether ranks end because rank 0 ended them."""
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._interrupts: list[Callable[[], object]] = []
        self._aborts: list[Callable[[], object]] = []
        self._guards = 0

    def on_failure(self, interrupt: Callable[[], object], *, waits_first: bool = False) -> None:
        """Call `interrupt`, from any thread, once a rank has died; with `waits_first` only if a wait lasts on."""
        (self._aborts if waits_first else self._interrupts).append(interrupt)

    def fail(self, failure: Failure) -> None:
        """Note a death, unless ranks are to end or one is known already, and end this process's waits."""
        with self._lock:
            if self.ending or self.failure is not None:
                return
            self.failure = failure
        try:
            for interrupt in self._interrupts:
                interrupt()
        finally:
            self._failed.set()
            threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        """End a wait that goes on: NCCL's kernels wait for ever, and its rendezvous cannot even be aborted."""
        assert self.failure is not None
        end = threading.Event()
        end.wait(_ABORT_S)
        if self._guards and not self.ending:
            for abort in self._aborts:
                abort()
        end.wait(_EXIT_S)
        if self._guards and not self.ending:
            error = self.failure.shown
            sys.stderr.write(f"hasten: error: {error}\n")
            sys.stderr.flush()
            os._exit(exit_status(error))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Where this process may wait for other ranks; raises the error of a rank that died before or within."""
        self.raise_failure()
        self._guards += 1
        try:
            yield
        finally:
            self._guards -= 1
        self.raise_failure()

    def raise_failure(self) -> None:
        """The error of a rank that has died, or a RankError that names the rank."""
        if self.failure is not None:
            raise self.failure.shown

    def await_failure(self, seconds: float = _EXPLAIN_S) -> Failure | None:
        """The first death, which may take a while to be known."""
        self._failed.wait(seconds)
        return self.failure

    def finish(self, work: dist.Work) -> None:
        """Wait for a collective on a CPU; RuntimeError where it fails or a rank dies.

        gloo forgets what it had begun to write to or to read from a rank that dies, and waits for ever. A timed wait
        for a collective, unlike for a message from rank to rank, leaves the connections as they are.
        """
        while True:
            try:
                work.wait(_POLL)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # it was completed since, or failed by itself
                    return
                if self._failed.is_set():
                    raise

    def outlive(self, build: Callable[[], Result]) -> Result:
        """The result of a function that waits for other ranks in ways that nothing can end.

        It runs in a thread, which is left behind where a rank dies: then RuntimeError.
        """
        future: Future[Result] = Future()
        woken = threading.Event()

        def run() -> None:
            try:
                future.set_result(build())
            except BaseException as error:
                future.set_exception(error)
            woken.set()

        self.on_failure(woken.set)
        threading.Thread(target=run, daemon=True).start()
        if self.failure is None:
            woken.wait()
        if not future.done():
            raise RuntimeError("a rank died while the ranks met")
        return future.result()
