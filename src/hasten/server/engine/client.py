"""The engines of one model, for the server: requests go in, deltas come out, whichever engine computes them.

Imports no torch. A request waits here, by priority and arrival, until an engine has a place for it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any

from hasten.core.config import EngineConfig
from hasten.core.cpus import available_cpus
from hasten.core.errors import ConfigError, EngineError, HastenError, InvalidRequestError
from hasten.core.types import FinishReason, PoolingParams, Request, SamplingParams
from hasten.engine.stats import EngineStats
from hasten.engine.text import Tokenizer
from hasten.server.cache_salt import cache_salt
from hasten.server.call import current_call
from hasten.server.engine.counters import LanguageCounters
from hasten.server.engine.link import Delivery
from hasten.server.engine.queue import (
    QueueError,
    QueueFullError,
    QueueLimits,
    QueueTimeoutError,
    QueueWaitError,
    RequestQueue,
)
from hasten.server.engine.replica import Replica
from hasten.server.engine.routing import prefixes_of
from hasten.server.engine.ticket import Progress, Ticket
from hasten.server.engine.wire import Add, CompletionDelta, EngineInfo, Start, framed
from hasten.server.options import ServerOptions
from hasten.server.tokenizing import check_entries, check_prompt_logprobs, check_words, tokenizing

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

_SHORT_PROMPT = 256
"""Tokens of prompts of which a thousand may begin at once: it takes some ten milliseconds."""
_FEW_WORDS = 8
"""Which are tokenized at once."""
_MOST_COMPLETIONS = 1024
"""Of one request: each is a sequence in the engine from the end of its prompt on."""
_MOST_LOGPROBS = 1024
"""Of one token."""
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


def _check_sizes(params: SamplingParams, vocab_size: int) -> None:
    """InvalidRequestError where parameters would make each token take long."""
    if params.n > _MOST_COMPLETIONS:
        raise InvalidRequestError(f"n must be at most {_MOST_COMPLETIONS}, got {params.n}")
    check_entries(vars(params))
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name) or 0
        if min(count, vocab_size) > _MOST_LOGPROBS:
            raise InvalidRequestError(f"{name} must be at most {_MOST_LOGPROBS}, got {count}")
    check_words("stop", params.stop)
    check_words("bad_words", params.bad_words)


def _frame(message: Add) -> bytearray:
    """A request as it goes to an engine; InvalidRequestError where it has numbers or text that cannot."""
    try:
        return framed(message)
    except (OverflowError, ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be passed to the engine: {error}") from None


def _may_stop(params: SamplingParams) -> bool:
    """Whether anything but `max_tokens` may end a completion."""
    ends = (params.stop, params.stop_token_ids, params.stop_words_ids, params.is_constrained, params.beam_width > 1)
    return not params.ignore_eos or any(ends)


def _attach(ticket: Ticket, params: SamplingParams | PoolingParams) -> None:
    """Let a request be one of the call that the running task works for."""
    if (call := current_call.get()) is not None:
        ticket.call, ticket.model, ticket.params = call, call.model, params


def _end_in_call(ticket: Ticket, reason: FinishReason | None, error: HastenError | None) -> None:
    if ticket.call is not None:
        ticket.call.end_request(ticket, time.monotonic(), reason, error)


def _tokenizer(folder: str) -> Tokenizer:
    """A folder's tokenizer, with what the first text would else wait for."""
    tokenizer = Tokenizer.from_folder(folder)
    _ = tokenizer.most_bytes_per_token
    return tokenizer


class EngineClosedError(EngineError):
    """The engine takes no requests any more: it is being drained, or is closed."""


class EngineClient:
    """The engines of one model. Made by `start`; `generate` may be called by many tasks of one event loop."""

    def __init__(
        self, config: EngineConfig, limits: QueueLimits, name: str, stall_timeout: float, engines: int = 1
    ) -> None:
        self.name = name
        self.info: EngineInfo
        """What its engines are, which are alike: the cache's blocks are those of all."""
        self.tokenizer: Tokenizer | None = None
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
        self._started = False
        self._foreseen: tuple[str, asyncio.Task[Tokenizer]] | None = None
        """A folder and the tokenizer in it, which is being loaded."""
        self._preparing = asyncio.Lock()
        self._infos: dict[Replica, EngineInfo] = {}
        self._closing: asyncio.Task[None] | None = None
        self._numbers = 0
        self._draining = False
        self._beginning = asyncio.Lock()
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
        client._foresee_tokenizer()
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

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = True,
        priority: int = 0,
        queue_timeout: float | None = None,
        salt: str | None = None,
        counted: bool = True,
    ) -> AsyncGenerator[Progress, None]:
        """Complete a prompt, text or token ids. Closing the generator withdraws the request.

        Each progress has what is new since the last one; without `stream` there is one, the finished one.
        `priority`: 1 is the highest, larger ones come later, 0 stands between 1 and 2. `queue_timeout`: seconds
        that it may wait before it is begun, if that is less than the engine's own limit. `salt`: the request's own
        `cache_salt`. `counted`: whether it is a request of its own in the counters, and no part of another one.

        Raises InvalidRequestError, QueueError where it cannot be begun in time, EngineClosedError where no new
        requests are taken, and EngineError where the process died.
        """
        options: dict[str, Any] = {"stream": stream, "priority": priority, "queue_timeout": queue_timeout}
        ticket = await self.submit(prompt, params, counted=counted, salt=salt, **options)
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
        counted: bool = True,
    ) -> Ticket:
        """Queue a request; what comes of it is taken from its ticket, whose `listener` hears of it.

        `withdraw` is to be called at its end. Arguments and errors are those of `generate`, but for an engine's death,
        which the ticket raises.
        """
        self.info.check_task(params)
        _check_sizes(params, self.info.vocab_size)
        salt = cache_salt(salt)
        self.check_wait(priority, queue_timeout)
        tokens = await self._tokens(prompt)
        check_prompt_logprobs(len(tokens), params.prompt_logprobs, self.info.vocab_size)
        ticket = self._ticket(tokens, await self._without_words(params), stream=stream, priority=priority, salt=salt)
        ticket.counted = counted
        if counted:
            _attach(ticket, params)
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
        tokens = request.prompt_token_ids
        self._check_length(tokens)
        await self._spread(len(tokens))
        number = self._next_number(priority)
        extra = request.token_type_ids, request.skipped_tokens, request.masks
        message = Add(number, tokens, None, False, request.pooling, *extra)
        message.cache_salt = cache_salt(None)
        ticket = Ticket(number, tokens, 1, _frame(message), priority)
        _attach(ticket, request.pooling)
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
        most = self.info.max_model_len - (1 if self.info.pooling is None else 0)
        limit = self._limits.max_prompt_tokens
        return most if limit is None else min(most, limit)

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
        each = None if self.tokenizer is None else self.tokenizer.most_bytes_per_token
        return self._limits.max_text_bytes if each is None else self.most_prompt_tokens * each

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, tokenizer: Tokenizer | None = None
    ) -> list[list[int]]:
        """Token ids of prompts, by another tokenizer than the model's where that is given.

        TextTooLongError where one is longer than may be, most often without tokenizing it.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("the model has no tokenizer; send token ids, or start it with --tokenizer-path")
        with self.counting_refusals():
            return await tokenizing.encode(
                tokenizer,
                texts,
                most_tokens=self.most_prompt_tokens,
                max_bytes=self._limits.max_text_bytes,
                add_special_tokens=add_special_tokens,
            )

    async def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            (ids,) = await self.tokenize([prompt])
            return tuple(ids)
        try:
            self._check_length(prompt)
            await self._spread(len(prompt))
            return tuple(map(index, prompt))
        except TypeError:
            raise InvalidRequestError(f"a prompt must be text or token ids, not {prompt!r:.80}") from None

    async def _spread(self, tokens: int) -> None:
        """Begin long prompts in different turns of the event loop, which would else begin those of a batch in one."""
        if tokens > _SHORT_PROMPT:
            async with self._beginning:
                await asyncio.sleep(0)

    def _check_length(self, prompt: Sequence[int]) -> None:
        if hasattr(prompt, "__len__") and len(prompt) > self.most_prompt_tokens:
            raise InvalidRequestError(f"the prompt has {len(prompt)} tokens, the limit is {self.most_prompt_tokens}")

    async def _without_words(self, params: SamplingParams) -> SamplingParams:
        """The same with bad words as tokens: the engine would tokenize them between two steps."""
        if not params.bad_words or self.tokenizer is None:
            return params
        tokenizer = self.tokenizer

        def runs() -> list[list[int]]:
            return [run for word in params.bad_words for run in tokenizer.words_ids(word)]

        with self.counting_refusals():
            found = runs() if len(params.bad_words) <= _FEW_WORDS else await tokenizing.run(runs)
        return replace(params, bad_words=(), bad_words_ids=(*params.bad_words_ids, *found))

    def _ticket(
        self, tokens: tuple[int, ...], params: SamplingParams, *, stream: bool, priority: int, salt: str
    ) -> Ticket:
        number = self._next_number(priority)
        frame = _frame(Add(number, tokens, params, stream, cache_salt=salt))
        most = params.max_length(len(tokens), self.info.max_model_len) - len(tokens)
        width = max(params.n, params.beam_width)
        prefixes = self._prefixes(tokens, params, salt)
        return Ticket(number, tokens, width, frame, priority, most, _may_stop(params), prefixes=prefixes)

    def _next_number(self, priority: int) -> int:
        """Of a request that may be queued."""
        if self._draining:
            raise EngineClosedError(f"engine {self.name} takes no new requests: it is about to end")
        if priority < 0:
            raise InvalidRequestError(f"priority must be 0 (the default), 1 (the highest) or larger, got {priority}")
        self._numbers += 1
        return self._numbers

    def _prefixes(self, tokens: tuple[int, ...], params: SamplingParams, salt: str) -> tuple[int, ...]:
        """What decides between engines: nothing for one, or for a prompt that no engine takes from its cache."""
        cached = self._config.cache.enable_prefix_caching and params.prompt_logprobs is None
        return prefixes_of(tokens, self.info.block_size, salt) if cached and len(self.replicas) > 1 else ()

    def _put(self, ticket: Ticket, queue_timeout: float | None, listener: Callable[[], None] | None) -> None:
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
        async with self._preparing:
            if info.tokenizer_folder is not None and (self._started or self.tokenizer is None):
                self.tokenizer = await self._load_tokenizer(info.tokenizer_folder)
        self._infos[replica] = info
        self.info = EngineInfo.of_all(list(self._infos.values()))

    async def _load_tokenizer(self, folder: str) -> Tokenizer:
        """The tokenizer that engines name, which is most often the foreseen one."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen[0] == folder:
            return await foreseen[1]
        return await asyncio.to_thread(_tokenizer, folder)

    def _foresee_tokenizer(self) -> None:
        """Begin to load the tokenizer of the model's folder, while the engines load the model."""
        folder = self._config.tokenizer or self._config.model
        if Path(folder, "tokenizer.json").is_file():
            loading = asyncio.create_task(asyncio.to_thread(_tokenizer, folder))
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever needs it asks
            self._foreseen = (folder, loading)

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
        if ticket.counted:
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
