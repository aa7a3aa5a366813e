"""The engines of one model, for the server: requests go in, deltas come out, whichever engine computes them.

Imports no torch. A request waits here, by priority and arrival, until an engine has a place for it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hasten.core.config import EngineConfig
from hasten.core.cpus import available_cpus
from hasten.core.errors import ConfigError, EngineError, HastenError
from hasten.core.types import FinishReason, Request, SamplingParams
from hasten.engine.stats import EngineStats
from hasten.engine.text import Tokenizer
from hasten.server.cache_salt import cache_salt
from hasten.server.engine.counters import LanguageCounters
from hasten.server.engine.intake import Intake, attach
from hasten.server.engine.link import Delivery
from hasten.server.engine.loaded import LoadedModel
from hasten.server.engine.queue import (
    QueueError,
    QueueFullError,
    QueueLimits,
    QueueTimeoutError,
    QueueWaitError,
    RequestQueue,
)
from hasten.server.engine.replica import Replica
from hasten.server.engine.ticket import Progress, Ticket
from hasten.server.engine.wire import CompletionDelta, EngineInfo, Start
from hasten.server.options import ServerOptions

__all__ = [
    "CompletionDelta",
    "EngineClient",
    "EngineClosedError",
    "EngineInfo",
    "EngineStats",
    "Progress",
    "QueueError",
    "QueueFullError",
    "QueueLimits",
    "QueueTimeoutError",
    "QueueWaitError",
]

_MIN_ENGINE_LIMIT = 8
"""Engines of one model that a machine with fewer CPUs may have, too: those of GPUs need little of them."""
_NO_LIMITS = QueueLimits()


def _check_engines(count: int) -> None:
    """ConfigError where one machine is to have more engines of a model than it could run."""
    cpus = available_cpus()
    most = max(cpus, _MIN_ENGINE_LIMIT)
    if count > most:
        raise ConfigError(
            f"data_parallel_size is {count}, the maximum on this machine is {most}: "
            f"each engine is a process that computes, and there are {cpus} CPUs"
        )


def _end_in_call(ticket: Ticket, reason: FinishReason | None, error: HastenError | None) -> None:
    if ticket.call is not None:
        ticket.call.end_request(ticket, time.monotonic(), reason, error)


class EngineClosedError(EngineError):
    """The engine takes no requests any more: it is being drained, or is closed."""


class EngineClient:
    """The engines of one model. Made by `start`; `generate` may be called by many tasks of one event loop."""

    def __init__(
        self, config: EngineConfig, limits: QueueLimits, name: str, stall_timeout: float, engines: int = 1
    ) -> None:
        self.name = name
        self.model = LoadedModel(config)
        self.refused: Counter[str] = Counter()
        """Requests that were refused or given up, by the reasons of QueueError."""
        self.counters = LanguageCounters()
        """What its requests took, by engine."""
        self.delivery = Delivery()
        self._config = config
        self._limits = limits
        self._queue = RequestQueue(limits, engines)
        self.replicas = [self._replica(index, stall_timeout) for index in range(engines)]
        """Each of the engines."""
        self._intake = Intake(config, limits, self.model, engines)
        self._closing: asyncio.Task[None] | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def _replica(self, index: int, stall_timeout: float) -> Replica:
        engines = self._queue.engines
        config = self._config if index == 0 else replace(self._config, progress_bars=False)
        return Replica(
            Start(config, index, len(engines)),
            engines[index],
            self,
            name=self.name if len(engines) == 1 else f"{self.name}, replica {index}",
            stall_timeout=stall_timeout,
            delivery=self.delivery,
        )

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        limits: QueueLimits = _NO_LIMITS,
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
        client.model.foresee()
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await client.close()
            raise
        client.model.started = True
        return client

    @property
    def info(self) -> EngineInfo:
        """What its engines are, once one of them is there."""
        return self.model.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of its texts; None where the model has none."""
        return self.model.tokenizer

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

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = True,
        priority: int = 0,
        queue_timeout: float | None = None,
        salt: str | None = None,
    ) -> AsyncGenerator[Progress, None]:
        """Complete a prompt, text or token ids. Closing the generator withdraws the request.

        Each progress has what is new since the last one; without `stream` there is one, the finished one.
        `priority`: 1 is the highest, larger ones come later, 0 stands between 1 and 2. `queue_timeout`: seconds
        that it may wait before it is begun, if that is less than the engine's own limit. `salt`: the request's own
        `cache_salt`.

        Raises InvalidRequestError, QueueError where it cannot be begun in time, EngineClosedError where no new
        requests are taken, and EngineError where the process died.
        """
        options: dict[str, Any] = {"stream": stream, "priority": priority, "queue_timeout": queue_timeout}
        ticket = await self.submit(prompt, params, salt=salt, **options)
        try:
            while True:
                progress = await ticket.read()
                yield progress
                if progress.finished:
                    return
        finally:
            self.withdraw(ticket)

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = True,
        priority: int = 0,
        queue_timeout: float | None = None,
        salt: str | None = None,
        listener: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue a request; what comes of it is taken from its ticket, whose `listener` hears of it.

        `withdraw` is to be called at its end. Arguments and errors are those of `generate`, but for an engine's death,
        which the ticket raises.
        """
        self._intake.check(params)
        salt = cache_salt(salt)
        self.check_wait(priority, queue_timeout)
        with self.counting_refusals(priority):
            ticket = await self._intake.ticket(prompt, params, stream=stream, priority=priority, salt=salt)
        attach(ticket, params)
        self._put(ticket, queue_timeout, listener)
        return ticket

    async def submit_text(
        self,
        request: Request,
        *,
        priority: int = 0,
        queue_timeout: float | None = None,
        listener: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue a text of which a vector or scores are to be made, as `request.pooling` says; else as `submit`."""
        assert request.pooling is not None, "it says what to make of the text"
        self.info.check_task(request.pooling)
        self.check_wait(priority, queue_timeout)
        ticket = await self._intake.text_ticket(request, priority)
        attach(ticket, request.pooling)
        self._put(ticket, queue_timeout, listener)
        return ticket

    def estimated_wait(self, priority: int = 0) -> float | None:
        """Seconds until a request that came now would be begun; None while too little is measured."""
        return self._queue.estimated_wait(priority)

    def check_wait(self, priority: int, queue_timeout: float | None) -> None:
        """QueueWaitError where a request would have to wait for longer than it may: to refuse it before any work."""
        with self.counting_refusals(priority):
            self._queue.check_wait(priority, self._timeout(queue_timeout))

    def _timeout(self, queue_timeout: float | None) -> float:
        """Seconds that a request may wait, 0 for ever: the least of its own limit and the engine's."""
        return min(filter(None, (queue_timeout, self._limits.default_timeout)), default=0.0)

    @contextmanager
    def counting_refusals(self, priority: int = 0) -> Iterator[None]:
        """Whatever works for a request of this engine: QueueErrors of it are counted, and say when to try again."""
        try:
            yield
        except QueueError as error:
            raise self._refusal(error, priority) from None

    def _refusal(self, error: QueueError, priority: int) -> QueueError:
        """An error of the queue, counted, with what its client should know."""
        self.refused[error.reason] += 1
        error.retry_after = self.estimated_wait(priority)
        return error

    @property
    def most_prompt_tokens(self) -> int:
        """Longest prompt that is taken: one token at least must fit behind it, where any are generated."""
        return self._intake.most_prompt_tokens

    @property
    def tool_call_parser(self) -> str:
        """The option of the engine: how its model writes calls of tools."""
        return self._config.tool_call_parser

    @property
    def reasoning_parser(self) -> str:
        """The option of the engine: how its model marks its reasoning."""
        return self._config.reasoning_parser

    @property
    def max_text_bytes(self) -> int:
        """Of a text whose bytes say nothing of its tokens."""
        return self._limits.max_text_bytes

    @property
    def most_characters(self) -> int:
        """Of a text that may fit a prompt; where its tokens do not say, the limit that stands in for them."""
        return self._intake.most_characters

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, tokenizer: Tokenizer | None = None
    ) -> list[list[int]]:
        """Token ids of prompts, by another tokenizer than the model's where that is given.

        TextTooLongError where one is longer than may be, most often without tokenizing it.
        """
        with self.counting_refusals():
            return await self._intake.tokenize(texts, add_special_tokens=add_special_tokens, tokenizer=tokenizer)

    def _put(self, ticket: Ticket, queue_timeout: float | None, listener: Callable[[], None] | None) -> None:
        if self._draining:
            raise EngineClosedError(f"engine {self.name} takes no new requests: it is about to end")
        ticket.timeout, ticket.listener = self._timeout(queue_timeout), listener
        with self.counting_refusals(ticket.priority):
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
        _end_in_call(ticket, None, error)
        self._queue.remove(ticket)
        ticket.fail(error)
        self.engine_changed()

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a request wherever it stands; one that has ended is forgotten already."""
        if not ticket.ended:
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

    async def prepare(self, replica: Replica, info: EngineInfo) -> None:
        """Take in what an engine is that has loaded its model; load the tokenizer, once at the start."""
        await self.model.take(replica, info)

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
        _end_in_call(ticket, reason, error)
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
