"""Requests of one engine as the server knows them: where each stands, and who goes to the engine next."""

import asyncio
import time
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from hasten.core.errors import HastenError
from hasten.core.types import Logprob
from hasten.server.engine.wire import CompletionDelta, Output

_DEFAULT_RANK = 1.5
"""Where requests without a priority stand: behind priority 1, before all larger ones."""
_SLACK = 8
"""One sequence more for each so many that may run waits in the engine, and fills a free place in the very next step."""


class QueueFullError(HastenError):
    """Too many requests wait already."""


class QueueTimeoutError(HastenError):
    """A request has waited for as long as it may, and was not begun."""


@dataclass(frozen=True)
class QueueLimits:
    """How many requests may wait, and for how long."""

    max_queue_size: int = 0
    """Requests waiting beyond those that run; 0: any number."""
    default_timeout: float | None = None
    """Seconds that a request may wait unless it says otherwise; None or 0: for ever."""
    max_prompt_tokens: int | None = None
    """Longer prompts are refused; None: what the engine can take."""
    max_queue_bytes: int = 64 << 20
    """Of the requests that wait, as they go to the engine: a token takes 1 to 5 bytes, and here about 50."""
    max_text_bytes: int = 1 << 20
    """Longer texts are refused where the tokenizer sets no bound on the bytes of a token."""


@dataclass
class Progress:
    """What is new of a request since its last progress."""

    completions: list[CompletionDelta]
    finished: bool
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry a prompt token, with the first progress."""
    queue_seconds: float | None = None
    """Time until the engine began to compute it, with the first progress."""

    def merge(self, later: "Progress") -> None:
        """Take in what came after it."""
        known = {delta.index: delta for delta in self.completions}
        for delta in later.completions:
            before = known.get(delta.index)
            if before is None:
                self.completions.append(delta)
            else:
                _extend(before, delta)
        self.finished = later.finished


def _extend(delta: CompletionDelta, later: CompletionDelta) -> None:
    delta.token_ids += later.token_ids
    delta.text += later.text
    if delta.logprobs is not None and later.logprobs is not None:
        delta.logprobs += later.logprobs
    delta.cumulative_logprob = later.cumulative_logprob
    delta.finish_reason, delta.stop_reason = later.finish_reason, later.stop_reason


@dataclass(eq=False)
class Ticket:
    """One request on its way. What its reader has not taken yet is kept as one progress, however slow the reader is."""

    number: int
    prompt_token_ids: tuple[int, ...]
    width: int
    """Sequences that it takes in the engine."""
    frame: bytearray
    """The message that brings it to the engine."""
    priority: int = 0
    timeout: float = 0.0
    """Seconds that it may wait; 0: for ever."""
    timer: asyncio.TimerHandle | None = None
    """Asks after it when it has waited for so long."""
    compiling: bool = False
    """Whether the engine has it, but waits for its grammar: it takes none of the engine's places then."""
    ahead: bool = False
    """Whether it is with the engine although the engine has no place for it yet."""
    begun: float | None = None
    """When the engine began to compute it."""
    arrived: float = field(default_factory=time.monotonic)
    _pending: Progress | None = None
    _error: HastenError | None = None
    _reader: "asyncio.Future[None] | None" = None
    _told: bool = False

    @property
    def order(self) -> tuple[float, int]:
        """Whose turn it is: by priority, then by arrival."""
        return (self.priority or _DEFAULT_RANK, self.number)

    def begin(self, now: float) -> None:
        """The engine computes it: the end of its wait."""
        self.begun, self.ahead = now, False
        self.stop_timer()

    def stop_timer(self) -> None:
        """It may take as long as it likes from now on."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def timed_out(self) -> QueueTimeoutError:
        """The error of a request that was not begun in time."""
        return QueueTimeoutError(f"the request was not begun within {self.timeout:g} s of waiting; try again later")

    def push(self, output: Output) -> None:
        """Give its reader more."""
        progress = Progress(output.completions, output.finished)
        if not self._told:
            self._told = True
            progress.prompt_token_ids, progress.prompt_logprobs = self.prompt_token_ids, output.prompt_logprobs
            progress.queue_seconds = max(0.0, (self.begun or time.monotonic()) - self.arrived)
        if self._pending is None:
            self._pending = progress
        else:
            self._pending.merge(progress)
        self._wake()

    def fail(self, error: HastenError) -> None:
        """Give its reader an error, after what came before it."""
        self.stop_timer()
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def read(self) -> Progress:
        """What is new; waits for it. Raises the error that ended the request."""
        while self._pending is None and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        progress, self._pending = self._pending, None
        if progress is not None:
            return progress
        assert self._error is not None
        raise self._error


class RequestQueue:
    """Who waits here, and who is with the engine: at most as many sequences as it runs, and a few more."""

    def __init__(self, limits: QueueLimits) -> None:
        self.places = 1
        """Sequences that the engine runs at once."""
        self._limits = limits
        self._waiting: list[Ticket] = []
        """In the order of their turns."""
        self._waiting_bytes = 0
        self._sent: dict[int, Ticket] = {}
        self._sequences = 0
        """Of the requests with the engine."""

    @property
    def num_waiting(self) -> int:
        """Requests that the engine has not got yet."""
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether there is no request at all."""
        return not self._waiting and not self._sent

    @property
    def engine_has_work(self) -> bool:
        """Whether the engine has a request that it should compute."""
        return self._sequences > 0

    def put(self, ticket: Ticket) -> None:
        """Queue a request. QueueFullError where it would have to wait and no more may."""
        if self._waiting or self._sequences + ticket.width > self.places:
            self._check_room(ticket)
        insort(self._waiting, ticket, key=_order)
        self._waiting_bytes += len(ticket.frame)

    def _check_room(self, ticket: Ticket) -> None:
        limit, most = self._limits.max_queue_size, self._limits.max_queue_bytes
        if limit:
            waiting = len(self._waiting) + sum(sent.ahead for sent in self._sent.values())
            if waiting >= limit:
                raise QueueFullError(f"{waiting} requests wait already, and max_queue_size is {limit}; try again later")
        if self._waiting and self._waiting_bytes + len(ticket.frame) > most:
            raise QueueFullError(
                f"requests of {self._waiting_bytes} bytes wait already, and max_queue_bytes is {most}; try again later"
            )

    def get(self, number: int) -> Ticket | None:
        """The request with this number, if the engine has it."""
        return self._sent.get(number)

    def next_for_engine(self) -> Iterator[Ticket]:
        """Requests that go to the engine now, strictly in their order. The last may take more places than are left."""
        room = self.places + max(1, self.places // _SLACK)
        while self._waiting and self._sequences < room:
            ticket = self._waiting.pop(0)
            self._waiting_bytes -= len(ticket.frame)
            ticket.ahead = self._sequences > 0 and self._sequences + ticket.width > self.places
            self._sequences += ticket.width
            self._sent[ticket.number] = ticket
            yield ticket

    def set_compiling(self, ticket: Ticket, compiling: bool) -> None:
        """A request with the engine begins to wait for its grammar, or has waited for it."""
        if ticket.compiling != compiling:
            ticket.compiling = compiling
            self._sequences += -ticket.width if compiling else ticket.width

    def remove(self, ticket: Ticket) -> bool:
        """Forget a request wherever it stands; whether the engine has it."""
        ticket.stop_timer()
        if self._sent.pop(ticket.number, None) is not None:
            self._sequences -= 0 if ticket.compiling else ticket.width
            return True
        place = bisect_left(self._waiting, ticket.order, key=_order)
        if place < len(self._waiting) and self._waiting[place] is ticket:
            del self._waiting[place]
            self._waiting_bytes -= len(ticket.frame)
        return False

    def take_sent(self) -> list[Ticket]:
        """Forget the requests that the engine has, and return them."""
        sent, self._sent, self._sequences = list(self._sent.values()), {}, 0
        return sent

    def take_all(self) -> list[Ticket]:
        """Forget all requests, and return them."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        return self.take_sent() + waiting


def _order(ticket: Ticket) -> tuple[float, int]:
    return ticket.order
