"""An engine in a process of its own, for the server: requests go in, deltas come out, and a dead process comes back.

Imports no torch. A request waits here, by priority and arrival, until the engine has a place for it.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import index

from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError, HastenError, InvalidRequestError, error_of
from hasten.core.types import SamplingParams
from hasten.engine.stats import EngineStats
from hasten.engine.text import Tokenizer
from hasten.server.engine.link import Delivery, EngineLink
from hasten.server.engine.queue import (
    QueueError,
    QueueFullError,
    QueueLimits,
    QueueTimeoutError,
    QueueWaitError,
    RequestQueue,
)
from hasten.server.engine.ticket import Progress, Ticket
from hasten.server.engine.wire import Abort, Add, CompletionDelta, EngineInfo, Expire, Output, Step, framed
from hasten.server.options import ServerOptions
from hasten.server.tokenizing import check_words, tokenizing

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

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
"""Before a dead process is started again: doubled each time, from the start again once it has lived for the longest."""
_SHORT_PROMPT = 256
"""Tokens of prompts of which a thousand may begin at once: it takes some ten milliseconds."""
_FEW_WORDS = 8
"""Which are tokenized at once."""
_MOST_COMPLETIONS = 1024
"""Of one request: each is a sequence in the engine from the end of its prompt on."""
_MOST_ENTRIES = {"stop_token_ids": 1024, "stop_words_ids": 1024, "bad_words_ids": 2048, "logit_bias": 4096}
"""Of one request: each is looked at for each token."""
_MOST_LOGPROBS = 1024
"""Of one token."""
_NO_LIMITS = QueueLimits()
_log = logging.getLogger(__name__)


def _check_sizes(params: SamplingParams, vocab_size: int) -> None:
    """InvalidRequestError where parameters would make each token take long."""
    if params.n > _MOST_COMPLETIONS:
        raise InvalidRequestError(f"n must be at most {_MOST_COMPLETIONS}, got {params.n}")
    for name, most in _MOST_ENTRIES.items():
        count = len(getattr(params, name))
        if count > most:
            raise InvalidRequestError(f"{name} has {count} entries, the limit is {most}")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name) or 0
        if min(count, vocab_size) > _MOST_LOGPROBS:
            raise InvalidRequestError(f"{name} must be at most {_MOST_LOGPROBS}, got {count}")
    check_words("stop", params.stop)
    check_words("bad_words", params.bad_words)


def _may_stop(params: SamplingParams) -> bool:
    """Whether anything but `max_tokens` may end a completion."""
    ends = (params.stop, params.stop_token_ids, params.stop_words_ids, params.is_constrained, params.beam_width > 1)
    return not params.ignore_eos or any(ends)


class EngineClosedError(EngineError):
    """The engine takes no requests any more: it is being drained, or is closed."""


class EngineClient:
    """One engine. Made by `start`; `generate` may be called by many tasks of one event loop."""

    def __init__(self, config: EngineConfig, limits: QueueLimits, name: str, stall_timeout: float) -> None:
        self.name = name
        self.info: EngineInfo
        self.tokenizer: Tokenizer | None = None
        self.restarts = 0
        """Times that a dead process was started again."""
        self.refused: Counter[str] = Counter()
        """Requests that were refused or given up, by the reasons of QueueError."""
        self.delivery = Delivery()
        self._config = config
        self._limits = limits
        self._queue = RequestQueue(limits)
        self._link: EngineLink | None = None
        """The process that is ready, if there is one."""
        self._keeper: asyncio.Task[None] | None = None
        """Starts the process again when it has died."""
        self._closing: asyncio.Task[None] | None = None
        self._ready_since = 0.0
        self._now = EngineStats()
        self._before = EngineStats()
        """Of processes that have ended: only the counters count."""
        self._numbers = 0
        self._draining = False
        self._beginning = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stall_timeout = stall_timeout
        self._heard = time.monotonic()
        """When the process last said something, or got work after it had none."""
        self._stalled = False
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        limits: QueueLimits = _NO_LIMITS,
        *,
        name: str = "engine",
        stall_timeout: float = ServerOptions.stall_timeout_secs,
    ) -> "EngineClient":
        """Start the process and wait until its model is loaded. Raises the HastenError that kept it from that.

        With requests and without a step for `stall_timeout` seconds, it is not `ready`.
        """
        client = cls(config, limits, name, stall_timeout)
        link = await client._launch()
        client._keeper = asyncio.create_task(client._keep(link))
        client._watcher = asyncio.create_task(client._watch())
        return client

    @property
    def ready(self) -> bool:
        """Whether requests are computed now; False while the process is dead, loads or stands still, and at the end."""
        return self._link is not None and not self._draining and not self._stalled

    @property
    def pid(self) -> int | None:
        """Number of the engine's process; None while there is none that is ready."""
        return None if self._link is None else self._link.pid

    def stats(self) -> EngineStats:
        """What goes on as of the engine's last step; counters go on when the process is started again."""
        return replace(self._now.after(self._before), waiting=self._now.waiting + self._queue.num_waiting)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = True,
        priority: int = 0,
        queue_timeout: float | None = None,
    ) -> AsyncGenerator[Progress, None]:
        """Complete a prompt, text or token ids. Closing the generator withdraws the request.

        Each progress has what is new since the last one; without `stream` there is one, the finished one.
        `priority`: 1 is the highest, larger ones come later, 0 stands between 1 and 2. `queue_timeout`: seconds
        that it may wait before it is begun, if that is less than the engine's own limit.

        Raises InvalidRequestError, QueueError where it cannot be begun in time, EngineClosedError where no new
        requests are taken, and EngineError where the process died.
        """
        _check_sizes(params, self.info.vocab_size)
        self.check_wait(priority, queue_timeout)
        tokens = await self._tokens(prompt)
        ticket = self._ticket(tokens, await self._without_words(params), stream=stream, priority=priority)
        ticket.timeout = self._timeout(queue_timeout)
        self._submit(ticket)
        try:
            while True:
                progress = await ticket.read()
                yield progress
                if progress.finished:
                    return
        finally:
            self._withdraw(ticket)

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
        """Longest prompt that is taken: one token at least must fit behind it."""
        most = self.info.max_model_len - 1
        limit = self._limits.max_prompt_tokens
        return most if limit is None else min(most, limit)

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

    def _ticket(self, tokens: tuple[int, ...], params: SamplingParams, *, stream: bool, priority: int) -> Ticket:
        if self._draining:
            raise EngineClosedError(f"engine {self.name} takes no new requests: it is about to end")
        if priority < 0:
            raise InvalidRequestError(f"priority must be 0 (the default), 1 (the highest) or larger, got {priority}")
        self._numbers += 1
        try:
            frame = framed(Add(self._numbers, tokens, params, stream))
        except (OverflowError, ValueError, TypeError) as error:
            raise InvalidRequestError(f"the request cannot be passed to the engine: {error}") from None
        most = params.max_length(len(tokens), self.info.max_model_len) - len(tokens)
        width = max(params.n, params.beam_width)
        return Ticket(self._numbers, tokens, width, frame, priority, most, _may_stop(params))

    def _submit(self, ticket: Ticket) -> None:
        with self.counting_refusals(ticket.priority):
            self._queue.put(ticket)
        self._idle.clear()
        if ticket.timeout:
            ticket.timer = asyncio.get_running_loop().call_later(ticket.timeout, self._expire, ticket)
        self._send_next()

    def _expire(self, ticket: Ticket) -> None:
        """A request has waited for as long as it may. The engine, if it has it, knows whether it was begun."""
        if self._link is not None and self._queue.get(ticket.number) is not None:
            self._link.send(Expire(ticket.number))
        else:
            self._end_late(ticket)

    def _end_late(self, ticket: Ticket) -> None:
        text = f"the request was not begun within {ticket.timeout:g} s of waiting; try again later"
        self._end(ticket, self._refusal(QueueTimeoutError(text), ticket.priority))

    def _end(self, ticket: Ticket | None, error: HastenError) -> None:
        """End a request with an error; None, if it has ended already."""
        if ticket is not None:
            self._queue.remove(ticket)
            ticket.fail(error)
            self._after_removal()

    def _withdraw(self, ticket: Ticket) -> None:
        """Forget a request wherever it stands; one that has ended is forgotten already."""
        if self._queue.remove(ticket) and self._link is not None:
            self._link.send(Abort(ticket.number))
        self._after_removal()

    def _after_removal(self) -> None:
        self._send_next()
        if self._queue.is_empty:
            self._idle.set()

    def _send_next(self) -> None:
        if self._link is None:
            return
        if not self._queue.engine_has_work:
            self._heard = time.monotonic()
        for ticket in self._queue.next_for_engine():
            self._link.send_frame(ticket.frame)

    def _on_steps(self, steps: list[Step]) -> None:
        """Take in what the engine has computed, and wake the readers: those of first tokens before all others."""
        self._heard = time.monotonic()
        self._set_stalled(False)
        first, others = dict[Ticket, None](), dict[Ticket, None]()
        for step in steps:
            self._take_changes(step)
            for output in step.outputs:
                if (ticket := self._queue.get(output.id)) is not None:
                    (others if ticket.has_output else first)[ticket] = None
                    self._take_output(ticket, output)
        for ticket in (*first, *others):
            ticket.wake()

    def _take_output(self, ticket: Ticket, output: Output) -> None:
        ticket.push(output)
        if output.finished:
            self._queue.finish(ticket)
            self._after_removal()

    def _take_changes(self, step: Step) -> None:
        """Note which requests were begun, have to wait for their grammars, or are none any more."""
        self._now, queue = step.stats, self._queue
        for numbers, compiling in ((step.compiling, True), (step.compiled, False)):
            for number in numbers:
                if (ticket := queue.get(number)) is not None:
                    queue.set_compiling(ticket, compiling)
        if step.compiling:
            self._send_next()
        queue.observe(step, self._heard)
        for refusal in step.refused:
            self._end(queue.get(refusal.id), error_of(refusal.kind, refusal.message))
        for number in step.expired:
            if (ticket := queue.get(number)) is not None:
                self._end_late(ticket)

    async def _watch(self) -> None:
        """See whether the process stands still."""
        while True:
            await asyncio.sleep(self._stall_timeout / 4)
            silent = time.monotonic() - self._heard > self._stall_timeout
            self._set_stalled(silent and self._link is not None and self._queue.engine_has_work)

    def _set_stalled(self, stalled: bool) -> None:
        if stalled and not self._stalled:
            text = "engine %s: it has requests, but has computed no step for %g s: not ready until it does"
            _log.error(text, self.name, time.monotonic() - self._heard)
        elif self._stalled and not stalled:
            _log.warning("engine %s: it computes again", self.name)
        self._stalled = stalled

    async def _launch(self) -> EngineLink:
        """Start a process and wait until it is ready."""
        began = time.monotonic()
        link = await EngineLink.open(self._config, self._on_steps, self.delivery)
        try:
            info = await asyncio.shield(link.info)
            if info.tokenizer_folder is not None:
                self.tokenizer = await asyncio.to_thread(Tokenizer.from_folder, info.tokenizer_folder)
            if link.lost.done():
                raise link.failure or EngineError("the engine's process died as soon as the model was loaded")
        except BaseException:
            await link.close()
            raise
        self._ready_since = time.monotonic()
        self.info = replace(info, load_seconds=self._ready_since - began)
        self._now = EngineStats(num_blocks=info.num_blocks)
        self._queue.attach(info.max_num_seqs)
        self._link = link
        link.lost.add_done_callback(lambda _: self._on_loss(link))
        self._send_next()
        return link

    def _on_loss(self, link: EngineLink) -> None:
        """The process is gone: who was with it gets an error at once; the others wait for the next one."""
        if self._link is not link:
            return  # it was told to end
        self._link = None
        reason = link.failure or "its process died"
        for ticket in self._queue.take_sent():
            ticket.fail(EngineError(f"engine {self.name} failed while it had the request: {reason}"))
        self._before = self.stats()
        self._now = EngineStats(num_blocks=self.info.num_blocks)
        self._after_removal()

    async def _keep(self, link: EngineLink) -> None:
        """Whenever the process has died, start it again."""
        delay = _FIRST_DELAY_S
        while True:
            how = await asyncio.shield(link.ended)
            _log.error(
                "engine %s: process %d died (%s): %s", self.name, link.pid, how, link.failure or "it said no more"
            )
            if time.monotonic() - self._ready_since > _LONGEST_DELAY_S:
                delay = _FIRST_DELAY_S
            while self._link is None:
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY_S)
                try:
                    link = await self._launch()
                except Exception as error:
                    _log.error("engine %s: cannot be started, next try in %.1f s: %s", self.name, delay, error)
            self.restarts += 1
            _log.warning("engine %s: ready again as process %d", self.name, link.pid)

    async def drain(self, timeout: float) -> bool:
        """Take no new requests and wait until all are done; whether they were within `timeout` seconds."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the process; requests that are not done get an EngineClosedError.

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
        link, self._link = self._link, None
        for task in (self._keeper, self._watcher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if link is not None:
            await link.close()
