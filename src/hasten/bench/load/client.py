"""One client process: it sends its part of a load when it is due, and records what comes of it."""

import asyncio
import gc
import signal
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from hasten.bench.child import end_with_parent
from hasten.bench.load.reply import Record, Reply, RequestError
from hasten.bench.load.target import Client, Target
from hasten.bench.load.workload import Conversation
from hasten.server.machine import raise_descriptor_limit

_LAG_S = 0.01
"""Seconds between two measurements of the event loop's lag."""


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """How a client process sends."""

    target: Target
    max_concurrency: int | None = None
    """Requests of this process in flight."""
    think_time: float = 0.0
    """Seconds between an answer and the next turn of its conversation."""
    timeout: float = 600.0
    """Seconds that a request may take."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process's part of a run."""

    conversations: Sequence[Conversation]
    waits_for_slots: bool = False
    """Whether requests are due as soon as fewer than the maximum are in flight, and not at times of their own."""
    duration: float | None = None
    """Seconds after which no request becomes due any more."""


@dataclass(slots=True)
class Ran:
    """What a process has measured: its requests and itself."""

    records: list[Record] = field(default_factory=list)
    lags: "array[float]" = field(default_factory=lambda: array("d"))
    """Seconds by which the event loop was late for a timer."""
    cpu_share: float = 0.0
    """CPU seconds per second."""


class LoadClient:
    """Sends conversations in an event loop."""

    def __init__(self, options: ClientOptions, progress: Callable[[], None] = lambda: None) -> None:
        self._options = options
        self._client: Client = options.target.client()
        self._progress = progress

    def prepared(self, run: Run) -> list[tuple[Conversation, Any]]:
        """Each conversation with its first request, ready to be sent."""
        return [
            (each, self._client.prepare(each.turns[0].prompt, each.turns[0].output_length, ()))
            for each in run.conversations
        ]

    async def run(self, run: Run, prepared: Sequence[tuple[Conversation, Any]], start: float) -> Ran:
        """Send conversations at their times after `start` (of `time.perf_counter`) and wait for all answers."""
        ran = Ran()
        work = _Conversations(self._options, self._client, run, start, ran.records, self._progress)
        async with _watched(ran), asyncio.TaskGroup() as group:
            for conversation, first in prepared:
                await _until(start + conversation.at)
                group.create_task(work.converse(conversation, first))
        return ran

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class _Conversations:
    """The conversations of one run."""

    def __init__(
        self,
        options: ClientOptions,
        client: Client,
        run: Run,
        start: float,
        records: list[Record],
        progress: Callable[[], None],
    ) -> None:
        self._options = options
        self._client = client
        self._run = run
        self._start = start
        self._records = records
        self._progress = progress
        self._slots = asyncio.Semaphore(options.max_concurrency) if options.max_concurrency else None

    async def converse(self, conversation: Conversation, request: Any) -> None:
        """Send the turns of a conversation, each behind the answer to the one before."""
        before: list[tuple[str, str]] = []
        due = self._start + conversation.at
        for number, turn in enumerate(conversation.turns):
            if number:
                await _until(due)
                request = self._client.prepare(turn.prompt, turn.output_length, before)
            record, reply = Record(due=due), Reply()
            async with self._slot() as was_full:
                record.ready = time.perf_counter() if was_full else due
                if self._run.waits_for_slots:
                    record.due = record.ready
                if self._is_over(record.due):
                    return
                await self._send(request, record, reply, turn.prompt)
            self._records.append(record)
            self._progress()
            if record.error:
                return
            before.append((str(turn.prompt), reply.text))
            due = record.end + self._options.think_time

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[bool]:
        """Below the maximum of requests in flight; whether it had to be waited for."""
        if self._slots is None:
            yield False
            return
        was_full = self._slots.locked()
        async with self._slots:
            yield was_full

    def _is_over(self, due: float) -> bool:
        return self._run.duration is not None and due >= self._start + self._run.duration

    async def _send(self, request: Any, record: Record, reply: Reply, prompt: str | list[int]) -> None:
        record.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._options.timeout):
                await self._client.send(request, reply)
            reply.write(record, prompt)
        except TimeoutError:
            record.fail(RequestError("timeout", f"no complete answer within {self._options.timeout:g} s"))
        except RequestError as error:
            record.fail(error)
        except Exception as error:  # an answer that this client does not understand ends its request, not the run
            record.fail(RequestError("not understood", repr(error)))


async def _until(moment: float) -> None:
    # timers of an event loop may be a fraction of a millisecond early
    while (left := moment - time.perf_counter()) > 0:
        await asyncio.sleep(left)


@asynccontextmanager
async def _watched(ran: Ran) -> AsyncIterator[None]:
    """Note the loop's lag and the process's CPU time while the block runs."""
    watch = asyncio.ensure_future(_measure_lag(ran.lags))
    cpu, start = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        ran.cpu_share = (time.process_time() - cpu) / max(time.perf_counter() - start, 1e-9)
        watch.cancel()


async def _measure_lag(lags: "array[float]") -> None:
    while True:
        wanted = time.perf_counter() + _LAG_S
        await asyncio.sleep(_LAG_S)
        lags.append(max(0.0, time.perf_counter() - wanted))


def serve_parent(pipe: Connection, options: ClientOptions, done: Any) -> None:
    """The main function of a client process.

    For each `Run` that comes through the pipe it answers with True once all requests are ready, takes the time to
    start at, and answers with `Ran`. It ends when the pipe does, or its parent. `done` is a shared counter of requests
    that have ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, too, and ends this process
    end_with_parent()
    raise_descriptor_limit()  # a connection per request in flight

    def count() -> None:
        done.value += 1

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        client = runner.run(_client(options, count))
        while True:
            try:
                run: Run = pipe.recv()
                prepared = client.prepared(run)
                gc.collect()
                gc.freeze()  # a collection of what stays would delay events
                pipe.send(True)
                pipe.send(runner.run(client.run(run, prepared, pipe.recv())))
            except EOFError:
                break
        runner.run(client.aclose())


async def _client(options: ClientOptions, progress: Callable[[], None]) -> LoadClient:
    return LoadClient(options, progress)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
