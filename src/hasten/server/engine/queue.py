"""Requests of one model as the server knows them: who waits, and who goes to which of its engines next."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hasten.core.errors import HastenError
from hasten.server.engine.assigned import AssignedRequests, choose
from hasten.server.engine.ticket import Ticket, rank_of
from hasten.server.engine.wait import MOST_SIMULATED
from hasten.server.options import SecurityOptions


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
class Queueing:
    """How a request waits, and what its prompt is kept apart by."""

    priority: int = 0
    """1 is the highest, larger ones come later, 0 stands between 1 and 2."""
    timeout: float | None = None
    """Seconds that it may wait before it is begun, if that is less than the engine's own limit."""
    salt: str | None = None
    """Its own `cache_salt`."""


DEFAULT_QUEUEING = Queueing()


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
    """Requests that wait here until any engine has a place for them, and the engines, which have others.

    A request is bound to an engine as late as can be: no queue is long while another one is empty, and what waits when
    an engine dies goes to the others.
    """

    def __init__(self, limits: QueueLimits, engines: int = 1) -> None:
        self._limits = limits
        self._estimates: dict[int, float | None] = {}
        """By the number of requests waiting here in front; until something changes."""
        self._waiting: list[Ticket] = []
        """In the order of their turns."""
        self._waiting_bytes = 0
        self.engines = [AssignedRequests(index, self._estimates.clear) for index in range(engines)]

    @property
    def num_waiting(self) -> int:
        """Requests that no engine has got yet."""
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether there is no request at all."""
        return not self._waiting and all(engine.is_empty for engine in self.engines)

    def _takers(self) -> list[AssignedRequests]:
        """The engines that are to get requests: those that stand still only where all do."""
        if len(self.engines) == 1:
            return self.engines if self.engines[0].attached else []
        attached = [engine for engine in self.engines if engine.attached]
        return [engine for engine in attached if not engine.stalled] or attached

    def put(self, ticket: Ticket) -> None:
        """Queue a request.

        QueueFullError where it would have to wait and no more may, QueueWaitError where it would wait for too long.
        """
        if self._waiting or not any(engine.fits(ticket.width) for engine in self._takers() or self.engines):
            self._check_room(ticket)
        self.check_wait(ticket.priority, ticket.timeout)
        self._insert(ticket)

    def put_back(self, ticket: Ticket) -> None:
        """Queue a request that an engine had and did not begin, at its old turn and whatever the limits."""
        ticket.move()
        self._insert(ticket)

    def _insert(self, ticket: Ticket) -> None:
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
        """Seconds until an engine would begin a request that came now; None while too little is known."""
        ahead = bisect_left(self._waiting, (rank_of(priority), float("inf")), key=_order)
        if ahead not in self._estimates:
            self._estimates[ahead] = self._estimate(ahead)
        return self._estimates[ahead]

    def _estimate(self, ahead: int) -> float | None:
        """The shortest wait behind `ahead` requests if these were dealt out to the engines in turn."""
        engines = self._takers() or self.engines
        count = len(engines)
        front = list(islice(self._waiting, min(ahead, MOST_SIMULATED * count)))
        waits = [
            engine.estimated_wait(front[turn::count], len(range(turn, ahead, count)))
            for turn, engine in enumerate(engines)
        ]
        return min((wait for wait in waits if wait is not None), default=None)

    def _check_room(self, ticket: Ticket) -> None:
        limit, most = self._limits.max_queue_size, self._limits.max_queue_bytes
        if limit:
            waiting = len(self._waiting) + sum(engine.num_ahead for engine in self.engines)
            if waiting >= limit:
                raise QueueFullError(f"{waiting} requests wait already, and max_queue_size is {limit}; try again later")
        if self._waiting and self._waiting_bytes + len(ticket.frame) > most:
            raise QueueFullError(
                f"requests of {self._waiting_bytes} bytes wait already, and max_queue_bytes is {most}; try again later"
            )

    def assign_next(self) -> Iterator[Ticket]:
        """Requests that go to engines now, strictly in their order; each knows its engine."""
        engines = self._takers() if self._waiting else []
        while self._waiting and (with_room := [engine for engine in engines if engine.has_room]):
            ticket = self._waiting[0]
            fitting = [engine for engine in with_room if engine.fits(ticket.width)]
            engine = choose(ticket, fitting or with_room)
            del self._waiting[0]
            self._waiting_bytes -= len(ticket.frame)
            engine.assign(ticket)
            yield ticket

    def remove(self, ticket: Ticket) -> AssignedRequests | None:
        """Forget a request wherever it stands; the engine that had it."""
        engine = ticket.engine
        if engine is not None:
            engine.remove(ticket)
            return engine
        ticket.stop_timer()
        self._estimates.clear()
        index = bisect_left(self._waiting, ticket.order, key=_order)
        if index < len(self._waiting) and self._waiting[index] is ticket:
            del self._waiting[index]
            self._waiting_bytes -= len(ticket.frame)
        return None

    def take_all(self) -> list[Ticket]:
        """Forget all requests, and return them."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._estimates.clear()
        return [*(ticket for engine in self.engines for ticket in engine.take_all()), *waiting]


def _order(ticket: Ticket) -> tuple[float, int]:
    return ticket.order
