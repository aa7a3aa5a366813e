"""The engines of one model, for the server: requests go in, deltas come out, whichever engine computes them.

Imports no torch. A request waits here, by priority and arrival, until an engine has a place for it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from hasten.core.config import EngineConfig
from hasten.core.cpus import available_cpus
from hasten.core.errors import ConfigError, EngineError, HastenError
from hasten.core.types import FinishReason, PoolingParams, Request, SamplingParams
from hasten.engine.stats import EngineStats
from hasten.engine.text import Tokenizer
from hasten.server.engine.counters import LanguageCounters
from hasten.server.engine.intake import Intake, attach
from hasten.server.engine.link import Delivery
from hasten.server.engine.queue import (
    DEFAULT_QUEUEING,
    QueueError,
    Queueing,
    QueueLimits,
    QueueTimeoutError,
    RequestQueue,
)
from hasten.server.engine.replica import Replica
from hasten.server.engine.ticket import Ticket
from hasten.server.options import ServerOptions

_MIN_ENGINE_LIMIT = 8
"""Engines of one model that a machine with fewer CPUs may have, too: those of GPUs need little of them."""
NO_LIMITS = QueueLimits()


def _check_engines(count: int) -> None:
    """ConfigError where one machine is to have more engines of a model than it could run."""
    cpus = available_cpus()
    most = max(cpus, _MIN_ENGINE_LIMIT)
    if count > most:
        raise ConfigError(
            f"data_parallel_size is {count}, the maximum on this machine is {most}: "
            f"each engine is a process that computes, and there are {cpus} CPUs"
        )


class EngineClosedError(EngineError):
    """The engine takes no requests any more: it is being drained, or is closed."""


class _Refusals:
    """See `EngineClient.counting_refusals`."""

    def __init__(self, count: Callable[[QueueError, int], object], priority: int) -> None:
        self._count, self._priority = count, priority

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QueueError):
            self._count(error, self._priority)


class EngineClient(Intake):
    """The engines of one model. Made by `start`; `submit` may be called by many tasks of one event loop."""

    def __init__(
        self, config: EngineConfig, limits: QueueLimits, name: str, stall_timeout: float, engines: int = 1
    ) -> None:
        super().__init__(config, limits, engines)
        self.name = name
        self.refused: Counter[str] = Counter()
        """Requests that were refused or given up, by the reasons of QueueError."""
        self.counters = LanguageCounters()
        """What its requests took, by engine."""
        self.delivery = Delivery()
        self._queue = RequestQueue(limits, engines)
        self.replicas = [Replica(self, requests, engines, stall_timeout) for requests in self._queue.engines]
        """Each of the engines."""
        self._closing: asyncio.Task[None] | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        limits: QueueLimits = NO_LIMITS,
        *,
        name: str = "engine",
        engines: int = 1,
        stall_timeout: float = ServerOptions.stall_timeout_secs,
    ) -> "EngineClient":
        """Start the engines and wait until all have loaded the model. Raises the HastenError that prevented it.

        An engine with requests and without a step for `stall_timeout` seconds is not `ready`.
        """
        _check_engines(engines)
        client = cls(config, limits, name, stall_timeout, engines)
        starting = [asyncio.create_task(replica.start()) for replica in client.replicas]
        client._foresee()
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await client.close()
            raise
        client._started = True
        return client

    @property
    def ready(self) -> bool:
        """Whether requests are computed now: an engine is there that does not stand still, and it is not the end."""
        return not self._draining and any(replica.ready for replica in self.replicas)

    @property
    def restarts(self) -> int:
        """Times that a dead process was started again."""
        return sum(replica.restarts for replica in self.replicas)

    @property
    def num_queued(self) -> int:
        """Requests that no engine has got yet."""
        return self._queue.num_waiting

    def stats(self) -> EngineStats:
        """What goes on as of the engines' last steps; counters go on when a process is started again."""
        total = EngineStats.total([replica.stats() for replica in self.replicas])
        return replace(total, waiting=total.waiting + self.num_queued)

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        queueing: Queueing = DEFAULT_QUEUEING,
        *,
        stream: bool = True,
        listener: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue a prompt, text or token ids, to be completed. What comes of it is taken from its ticket.

        Each progress has what is new since the last one; without `stream` there is one, the finished one. `listener`
        hears of it. `withdraw` is to be called at its end.

        Raises InvalidRequestError, QueueError where it cannot be begun in time, and EngineClosedError where no new
        requests are taken. The ticket raises these too, and EngineError where the process died.
        """
        self._check(params)
        with self.counting_refusals(queueing.priority):
            self._check_wait(queueing)
            ticket = await self._ticket(prompt, params, queueing, stream=stream)
            self._put(ticket, params, queueing, listener)
        return ticket

    async def submit_text(
        self, request: Request, queueing: Queueing = DEFAULT_QUEUEING, *, listener: Callable[[], None] | None = None
    ) -> Ticket:
        """Queue a text of which a vector or scores are to be made, as `request.pooling` says; else as `submit`."""
        assert request.pooling is not None, "it says what to make of the text"
        self.info.check_task(request.pooling)
        with self.counting_refusals(queueing.priority):
            self._check_wait(queueing)
            ticket = await self._text_ticket(request, queueing)
            self._put(ticket, request.pooling, queueing, listener)
        return ticket

    def estimated_wait(self, priority: int = 0) -> float | None:
        """Seconds until a request that came now would be begun; None while too little is measured."""
        return self._queue.estimated_wait(priority)

    def check_wait(self, queueing: Queueing) -> None:
        """QueueWaitError where a request would have to wait for longer than it may: to refuse it before any work."""
        with self.counting_refusals(queueing.priority):
            self._check_wait(queueing)

    def _check_wait(self, queueing: Queueing) -> None:
        self._queue.check_wait(queueing.priority, self._timeout(queueing.timeout))

    def _timeout(self, queue_timeout: float | None) -> float:
        """Seconds that a request may wait, 0 for ever: the least of its own limit and the engine's."""
        return min(filter(None, (queue_timeout, self._limits.default_timeout)), default=0.0)

    def counting_refusals(self, priority: int = 0) -> "_Refusals":
        """Whatever works for a request of this engine: QueueErrors of it are counted, and say when to try again."""
        return _Refusals(self._refusal, priority)

    def _refusal(self, error: QueueError, priority: int) -> QueueError:
        """An error of the queue, counted, with what its client should know."""
        self.refused[error.reason] += 1
        error.retry_after = self.estimated_wait(priority)
        return error

    @property
    def max_text_bytes(self) -> int:
        """Of a text whose bytes say nothing of its tokens."""
        return self._limits.max_text_bytes

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, tokenizer: Tokenizer | None = None
    ) -> list[list[int]]:
        """Token ids of prompts, by another tokenizer than the model's where that is given.

        TextTooLongError where one is longer than may be, most often without tokenizing it.
        """
        with self.counting_refusals():
            return await self._encode(texts, add_special_tokens=add_special_tokens, tokenizer=tokenizer)

    def _put(
        self,
        ticket: Ticket,
        params: SamplingParams | PoolingParams,
        queueing: Queueing,
        listener: Callable[[], None] | None,
    ) -> None:
        if self._draining:
            raise EngineClosedError(f"engine {self.name} takes no new requests: it is about to end")
        attach(ticket, params)
        ticket.timeout, ticket.listener = self._timeout(queueing.timeout), listener
        self._queue.put(ticket)
        self._idle.clear()
        if ticket.timeout:
            ticket.timer = asyncio.get_running_loop().call_later(ticket.timeout, self._expire, ticket)
        self._send_next()

    def _expire(self, ticket: Ticket) -> None:
        """A request has waited for as long as it may. The engine, if one has it, knows whether it was begun."""
        if ticket.engine is None:
            self.end_late(ticket)
        else:
            self.replicas[ticket.engine.index].expire(ticket)

    def end_late(self, ticket: Ticket) -> None:
        """End a request that has waited for as long as it may."""
        text = f"the request was not begun within {ticket.timeout:g} s of waiting; try again later"
        self.end(ticket, self._refusal(QueueTimeoutError(text), ticket.priority))

    def end(self, ticket: Ticket, error: HastenError) -> None:
        """End a request with an error."""
        if ticket.call is not None:
            ticket.call.end_request(ticket, time.monotonic(), error)
        self._queue.remove(ticket)
        ticket.fail(error)
        self.engine_changed()

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a request wherever it stands; one that has ended is forgotten already."""
        if ticket.ended:
            return
        ticket.ended = True
        self._count_end(ticket, 0 if ticket.engine is None else ticket.engine.index, FinishReason.ABORT)
        engine = self._queue.remove(ticket)
        if engine is not None:
            self.replicas[engine.index].abort(ticket)
        self.engine_changed()

    def engine_changed(self) -> None:
        """An engine may take requests that wait, or there are fewer."""
        self._send_next()
        if self._queue.is_empty:
            self._idle.set()

    def _send_next(self) -> None:
        for ticket in self._queue.assign_next():
            assert ticket.engine is not None, "it was assigned to one"
            self.replicas[ticket.engine.index].send(ticket)

    def engine_lost(self, index: int, tickets: list[Ticket], error: EngineError) -> None:
        """Requests that have begun get an error at once; the others go to another engine, where there are several."""
        for ticket in tickets:
            if ticket.may_move and len(self.replicas) > 1:
                self._queue.put_back(ticket)
            else:
                self._count_end(ticket, index, FinishReason.ERROR, error)
                ticket.fail(error)
        self.engine_changed()

    def _count_end(self, ticket: Ticket, index: int, reason: FinishReason, error: HastenError | None = None) -> None:
        """Count a request of engine `index` that ends without its last output."""
        ticket.reasons.append(reason)
        if ticket.call is not None:
            ticket.call.end_request(ticket, time.monotonic(), error)
        self.counters.of(index).finished[reason] += 1

    def engine_stalled(self, replica: Replica) -> None:
        """What an engine has not begun goes to another one, where one computes."""
        if not any(other.ready for other in self.replicas):
            return
        for ticket in replica.requests.take_movable():
            replica.abort(ticket)
            self._queue.put_back(ticket)
        self.engine_changed()

    async def drain(self, timeout: float) -> bool:
        """Take no new requests and wait until all are done; whether they were within `timeout` seconds."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End all processes; requests that are not done get an EngineClosedError.

        Cancelled, it goes on; a second call waits for the end of the first.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._draining = True
        for ticket in self._queue.take_all():
            ticket.fail(EngineClosedError(f"engine {self.name} was closed before the request was done"))
        self._idle.set()
        await asyncio.gather(*(replica.close() for replica in self.replicas))
