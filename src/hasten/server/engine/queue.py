"""Requests of one engine as the server knows them: where each stands, and who goes to the engine next."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hasten.core.errors import HastenError
from hasten.server.engine.ticket import Ticket, rank_of
from hasten.server.engine.wait import MOST_SIMULATED, WaitEstimator
from hasten.server.engine.wire import Step
from hasten.server.options import SecurityOptions

_SLACK = 8
"""One sequence more for each so many that may run waits in the engine, and fills a free place in the very next step."""


class QueueError(HastenError):
    """A request that the queue refuses, or gives up: the server has more work than it can do in time."""

    reason = "other"
    """In metrics and in error codes."""
    retry_after: float | None = None
    """Estimated seconds until what waits now has begun; None where nothing is known of that."""


class QueueFullError(QueueError):
    """Too many requests wait already."""

    reason = "queue_full"


class QueueTimeoutError(QueueError):
    """A request has waited for as long as it may, and was not begun."""

    reason = "queue_timeout"


class QueueWaitError(QueueError):
    """A request would have to wait for longer than it may."""

    reason = "queue_wait"


QUEUE_REASONS = tuple(kind.reason for kind in (QueueFullError, QueueTimeoutError, QueueWaitError))
"""Why the queue refuses requests, or gives them up."""


@dataclass(frozen=True)
class QueueLimits:
    """How many requests may wait, and for how long."""

    max_queue_size: int = 0
    """Requests waiting beyond those that run; 0: any number."""
    default_timeout: float | None = None
    """Seconds that a request may wait unless it says otherwise; None or 0: for ever."""
    max_prompt_tokens: int | None = None
    """Longer prompts are refused; None: what the engine can take."""
    max_queue_bytes: int = SecurityOptions.max_queue_bytes
    """Of the requests that wait, as they go to the engine: a token takes 1 to 5 bytes, and here about 50."""
    max_text_bytes: int = SecurityOptions.max_text_bytes
    """Longer texts are refused where the tokenizer sets no bound on the bytes of a token."""


class RequestQueue:
    """Who waits here, and who is with the engine: at most as many sequences as it runs, and a few more."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._places = 1
        """Sequences that the engine runs at once."""
        self._waits = WaitEstimator(self._places)
        self._estimates: dict[int, float | None] = {}
        """By the number of requests waiting here in front; until something changes."""
        self._waiting: list[Ticket] = []
        """In the order of their turns."""
        self._waiting_bytes = 0
        self._sent: dict[int, Ticket] = {}
        self._sequences = self._begun = 0
        """Of the requests with the engine, and of those that it has begun."""
        self._compiling = 0
        """Requests with the engine that wait for their grammars."""

    def attach(self, places: int) -> None:
        """A process of the engine is ready that runs so many sequences at once; nothing is measured of it yet."""
        self._places = places
        self._waits = WaitEstimator(places)
        self._estimates.clear()

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
        """Queue a request.

        QueueFullError where it would have to wait and no more may, QueueWaitError where it would wait for too long.
        """
        if self._waiting or self._sequences + ticket.width > self._places:
            self._check_room(ticket)
        self.check_wait(ticket.priority, ticket.timeout)
        insort(self._waiting, ticket, key=_order)
        self._waiting_bytes += len(ticket.frame)
        self._estimates.clear()

    def check_wait(self, priority: int, timeout: float) -> None:
        """QueueWaitError where a request would wait for longer than `timeout` seconds; 0: it may wait for ever."""
        wait = self.estimated_wait(priority) if timeout else None
        if wait is not None and wait > timeout:
            raise QueueWaitError(
                f"the request would wait for about {wait:.2g} s, and may wait for {timeout:g} s; try again later"
            )

    def estimated_wait(self, priority: int = 0) -> float | None:
        """Seconds until the engine would begin a request that came now; None while too little is known."""
        place = bisect_left(self._waiting, (rank_of(priority), float("inf")), key=_order)
        if place not in self._estimates:
            self._estimates[place] = self._estimate(place)
        return self._estimates[place]

    def _estimate(self, place: int) -> float | None:
        running = [ticket for ticket in self._sent.values() if ticket.begun is not None]
        front = [ticket for ticket in self._sent.values() if ticket.begun is None and not ticket.compiling]
        count = len(front) + place
        front += islice(self._waiting, min(place, MOST_SIMULATED))
        return self._waits.seconds(running, front, count)

    def observe(self, step: Step, now: float) -> None:
        """Take in what the engine says of its state, and of the requests that it has begun."""
        self._estimates.clear()
        begun = [ticket for number in step.started if (ticket := self._sent.get(number)) is not None]
        for ticket in begun:
            ticket.begin(step.began, step.stats.steps)
            self._begun += ticket.width
        holds_back = step.stats.waiting > self._compiling and self._begun < self._places
        self._waits.observe(step.stats, now, begun, holds_back=holds_back)

    def finish(self, ticket: Ticket) -> None:
        """A request has its last token."""
        self._waits.ended(ticket)
        self.remove(ticket)

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
        room = self._places + max(1, self._places // _SLACK)
        self._estimates.clear()
        while self._waiting and self._sequences < room:
            ticket = self._waiting.pop(0)
            self._waiting_bytes -= len(ticket.frame)
            ticket.ahead = self._sequences > 0 and self._sequences + ticket.width > self._places
            self._sequences += ticket.width
            self._sent[ticket.number] = ticket
            yield ticket

    def set_compiling(self, ticket: Ticket, compiling: bool) -> None:
        """A request with the engine begins to wait for its grammar, or has waited for it."""
        if ticket.compiling != compiling:
            ticket.compiling = compiling
            self._sequences += -ticket.width if compiling else ticket.width
            self._compiling += 1 if compiling else -1
            self._estimates.clear()

    def remove(self, ticket: Ticket) -> bool:
        """Forget a request wherever it stands; whether the engine has it."""
        ticket.stop_timer()
        self._estimates.clear()
        if self._sent.pop(ticket.number, None) is not None:
            self._sequences -= 0 if ticket.compiling else ticket.width
            self._begun -= 0 if ticket.begun is None else ticket.width
            self._compiling -= ticket.compiling
            return True
        place = bisect_left(self._waiting, ticket.order, key=_order)
        if place < len(self._waiting) and self._waiting[place] is ticket:
            del self._waiting[place]
            self._waiting_bytes -= len(ticket.frame)
        return False

    def take_sent(self) -> list[Ticket]:
        """Forget the requests that the engine has, and return them."""
        sent, self._sent = list(self._sent.values()), {}
        self._sequences = self._begun = self._compiling = 0
        self._estimates.clear()
        return sent

    def take_all(self) -> list[Ticket]:
        """Forget all requests, and return them."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        return self.take_sent() + waiting


def _order(ticket: Ticket) -> tuple[float, int]:
    return ticket.order
