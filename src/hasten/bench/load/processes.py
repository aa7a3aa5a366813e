"""The client processes of a load, seen from the process that started them."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from hasten.bench.load.client import ClientOptions, Ran, Run, serve_parent
from hasten.bench.load.workload import Conversation
from hasten.core.errors import EngineError

_START_DELAY_S = 0.1
"""For the start's time to reach all processes."""
_POLL_S = 0.2
_STOP_S = 5.0


class LoadClients:
    """Client processes among which the requests of each run are divided. A context manager: they end with it."""

    def __init__(self, options: ClientOptions, count: int) -> None:
        limits = _divided(options.max_concurrency, count)
        self._children = [_Child(replace(options, max_concurrency=limit)) for limit in limits]

    def __enter__(self) -> "LoadClients":
        with ExitStack() as stack:
            for child in self._children:
                child.start()
                stack.callback(child.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            for child in self._children:
                child.terminate()  # it may be in the middle of a run, which nobody waits for
        self._stack.close()

    def run(
        self,
        conversations: Sequence[Conversation],
        *,
        waits_for_slots: bool = False,
        duration: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Ran]:
        """Send conversations, each process every n-th of them, and return what each has measured.

        `progress` is called now and then with the number of requests that have ended so far.
        """
        for index, child in enumerate(self._children):
            part = conversations[index :: len(self._children)]
            child.send(Run(conversations=part, waits_for_slots=waits_for_slots, duration=duration))
        for child in self._children:
            child.receive()
        start = time.perf_counter() + _START_DELAY_S
        before = self._done()
        for child in self._children:
            child.send(start)
        waiting = {child.pipe for child in self._children}
        while waiting:
            if progress is not None:
                progress(self._done() - before)
            waiting -= set(wait(list(waiting), _POLL_S))
        return [child.receive() for child in self._children]

    def _done(self) -> int:
        return sum(child.done.value for child in self._children)


def _divided(total: int | None, count: int) -> list[int | None]:
    """A maximum of requests in flight divided among processes, of which there are no more than requests."""
    if total is None:
        return [None] * count
    count = min(count, total)
    return [total // count + (index < total % count) for index in range(count)]


class _Child:
    """One client process."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self.pipe: Connection
        self.done: Any
        self._process: multiprocessing.process.BaseProcess

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.done = context.Value("Q", 0, lock=False)
        self._process = context.Process(target=serve_parent, args=(child_end, self._options, self.done), daemon=True)
        self._process.start()
        child_end.close()

    def terminate(self) -> None:
        self._process.terminate()

    def stop(self) -> None:
        self.pipe.close()
        self._process.join(_STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def send(self, what: Any) -> None:
        with suppress(ConnectionError):  # `receive` says that the process has ended
            self.pipe.send(what)

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_STOP_S)
            raise EngineError(f"a client process ended with status {self._process.exitcode}") from None
