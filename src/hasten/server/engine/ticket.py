"""One request on its way to its reader: what the engine has computed of it and the reader has not taken yet."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from hasten.core.errors import HastenError
from hasten.core.types import FinishReason, PoolingParams, SamplingParams
from hasten.server.call import Call
from hasten.server.engine.pieces import cost
from hasten.server.engine.wire import CompletionDelta, FirstToken, Logprob, Output, PooledData

if TYPE_CHECKING:
    from hasten.server.engine.assigned import AssignedRequests

_DEFAULT_RANK = 1.5
"""Where requests without a priority stand: behind priority 1, before all larger ones."""


_TOKEN_BYTES = 8


def rank_of(priority: int) -> float:
    """The place of a priority among the others: smaller ones go first."""
    return priority or _DEFAULT_RANK


@dataclass(slots=True)
class Progress:
    """What is new of a request since its last progress."""

    completions: list[CompletionDelta]
    finished: bool
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry a prompt token, with the first progress."""
    queue_seconds: float | None = None
    """Time until the engine began to compute it, with the first progress."""
    tokens: int = 0
    """Of all completions."""
    pooled: PooledData | None = None
    """What was made of a text."""

    @property
    def size(self) -> int:
        """About the bytes of what is made of it for a client."""
        return _TOKEN_BYTES * (cost(self) + len(self.prompt_token_ids))

    def merge(self, later: "Progress") -> None:
        """Take in what came after it."""
        known = {delta.index: delta for delta in self.completions}
        for delta in later.completions:
            before = known.get(delta.index)
            if before is None:
                self.completions.append(delta)
            else:
                _extend(before, delta)
        self.tokens += later.tokens
        self.finished = later.finished
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + later.prompt_logprobs
        if later.pooled is not None and self.pooled is not None:
            self.pooled.data += later.pooled.data


def _extend(delta: CompletionDelta, later: CompletionDelta) -> None:
    delta.token_ids += later.token_ids
    delta.text += later.text
    if delta.logprobs is not None and later.logprobs is not None:
        delta.logprobs += later.logprobs
    if delta.token_logprobs is not None and later.token_logprobs is not None:
        delta.token_logprobs += later.token_logprobs
    delta.cumulative_logprob = later.cumulative_logprob
    delta.finish_reason, delta.stop_reason = later.finish_reason, later.stop_reason


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way. What its reader has not taken yet is kept as one progress, however slow the reader is."""

    number: int
    prompt_token_ids: tuple[int, ...]
    width: int
    """Sequences that it takes in the engine."""
    frame: bytearray
    """The message that brings it to the engine."""
    priority: int = 0
    max_tokens: int = 1
    """Most tokens of each of its completions."""
    may_stop: bool = False
    """Whether a completion may end before `max_tokens`."""
    timeout: float = 0.0
    """Seconds that it may wait; 0: for ever."""
    timer: asyncio.TimerHandle | None = None
    """Asks after it when it has waited for so long."""
    prefixes: tuple[int, ...] = ()
    """Hashes of its prompt's blocks, where several engines might have them cached."""
    engine: "AssignedRequests | None" = None
    """The requests of the engine that has it; None while it waits in the server, and once it has ended."""
    to_compute: int = 0
    """Tokens of its prompt that this engine probably has not cached."""
    moved: bool = False
    """Whether an engine had it that died or stood still before it began it."""
    compiling: bool = False
    """Whether the engine has it, but waits for its grammar: it takes none of the engine's places then."""
    ahead: bool = False
    """Whether it is with the engine although the engine has no place for it yet."""
    begun: float | None = None
    """When the engine began to compute it."""
    begun_step: int = 0
    """The engine's count of steps when the server heard of it."""
    tokens: int = 0
    """That have come, of all its completions."""
    has_output: bool = False
    """Whether anything of it has come."""
    first: FirstToken | None = None
    """What is known of its first token, once there is one."""
    reasons: list[FinishReason] = field(default_factory=list)
    """How its completions ended, of those that have."""
    call: Call | None = None
    """Whose request it is, where that is known."""
    model: str = ""
    """As the client called it."""
    params: SamplingParams | PoolingParams | None = None
    """Of a request of a call."""
    ended: bool = False
    """Whether its last output has come, or an error in its stead, or its reader has left."""
    stops: int = 0
    """Completions that ended before their `max_tokens`."""
    arrived: float = field(default_factory=time.monotonic)
    listener: Callable[[], None] | None = None
    """Called when there is something to take, from the event loop's callback that brought it: it must not raise."""
    _pending: Progress | None = None
    _error: HastenError | None = None
    _partial: bool = False
    """Whether the end of what is pending has yet to come."""

    @property
    def order(self) -> tuple[float, int]:
        """Whose turn it is: by priority, then by arrival."""
        return (rank_of(self.priority), self.number)

    def begin(self, now: float, step: int = 0) -> None:
        """The engine computes it: the end of its wait."""
        self.begun, self.begun_step, self.ahead = now, step, False
        self.stop_timer()

    @property
    def queue_seconds(self) -> float:
        """Time until the engine began to compute it."""
        return max(0.0, (self.begun or time.monotonic()) - self.arrived)

    @property
    def may_move(self) -> bool:
        """Whether another engine may have it instead: nothing of it was computed, and it did not lose an engine before.

        That may have been its fault; it is not to end one engine after the other.
        """
        return self.begun is None and not self.moved

    def move(self) -> None:
        """It goes back to those that wait, from an engine that has not begun it."""
        self.moved, self.ahead, self.compiling = True, False, False

    def stop_timer(self) -> None:
        """It may take as long as it likes from now on."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def push(self, output: Output) -> None:
        """Keep more for its reader, who is to be woken up then."""
        progress = Progress(output.completions, output.finished, prompt_logprobs=output.prompt_logprobs)
        progress.pooled = output.pooled
        for delta in output.completions:
            progress.tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self.reasons.append(delta.finish_reason)
            if delta.finish_reason is FinishReason.STOP:
                self.stops += 1
        self.tokens += progress.tokens
        if not self.has_output:
            self.has_output = True
            progress.prompt_token_ids = self.prompt_token_ids
            progress.queue_seconds = self.queue_seconds
            self.first = output.first
        if self._pending is None:
            self._pending = progress
        else:
            self._pending.merge(progress)
        self._partial = output.partial

    def fail(self, error: HastenError) -> None:
        """Give its reader an error, after what came before it."""
        self.stop_timer()
        self.ended = True
        self._error = error
        self.wake()

    def wake(self) -> None:
        """Have its reader take what there is."""
        if self.listener is not None:
            self.listener()

    def take(self) -> Progress | None:
        """What is new since the last call, if anything. Raises the error that ended the request, after the rest."""
        if self._pending is not None and not self._partial:
            progress, self._pending = self._pending, None
            return progress
        if self._error is not None:
            raise self._error
        return None

    async def read(self) -> Progress:
        """What is new; waits for it. Raises the error that ended the request."""
        while (progress := self.take()) is None:
            news = asyncio.get_running_loop().create_future()
            self.listener = partial(_set, news)
            await news
        return progress


def _set(news: "asyncio.Future[None]") -> None:
    if not news.done():
        news.set_result(None)
