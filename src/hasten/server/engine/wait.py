"""Estimate of the time that a request would wait before the engine begins to compute it.

Two things keep a request waiting. All sequences that the engine runs at once may be taken: then the estimate plays the
queue forward, each request for as many steps as it is expected to have tokens left. Or the engine holds requests back
although it could run more, for lack of cache or because the prompt tokens of a step are limited: then requests begin at
the rate at which they did lately. Whatever has not been measured yet counts as no wait.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hasten.engine.stats import EngineStats
from hasten.server.engine.ticket import Ticket

_HALF_LIFE_STEPS, _HALF_LIFE_BEGINS_STEPS, _HALF_LIFE_REQUESTS = 64.0, 256.0, 128.0
"""Half-life of measurements, in numbers of them: times of steps, beginnings of requests, lengths of outputs."""
_LEAST_STEPS = 16
"""To be measured before there is an estimate: the first steps of an engine are slower."""
MOST_SIMULATED = 1024
"""Requests that are played forward one by one; more of them take proportionally longer."""
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class RecentRatio:
    """Quotient of two sums in which each addition halves the weight of what came `half_life` before it."""

    half_life: float
    numerator: float = 0.0
    denominator: float = 0.0

    def add(self, numerator: float, denominator: float, age: float) -> None:
        """Add to both sums; `age` is by how much this makes earlier additions older."""
        keep: float = 0.5 ** (age / self.half_life)
        self.numerator = self.numerator * keep + numerator
        self.denominator = self.denominator * keep + denominator

    @property
    def value(self) -> float:
        """The quotient; 0 while there is nothing to divide by."""
        return self.numerator / self.denominator if self.denominator else 0.0


class WaitEstimator:
    """What the engine of one process has done lately, and the wait that follows from it."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        """Sequences that the engine runs at once."""
        self._step_seconds = RecentRatio(_HALF_LIFE_STEPS)
        self._begun_tokens = RecentRatio(_HALF_LIFE_BEGINS_STEPS)
        """Tokens of the requests that were begun per second, while the engine held others back."""
        self._stops = RecentRatio(_HALF_LIFE_REQUESTS)
        """Ends per token, of completions that may end before their maximum."""
        self._held_seconds, self._held_steps = 0.0, 0
        """Since a request was begun, while the engine held others back."""
        self._steps_measured = 0
        self._since, self._steps = 0.0, 0
        """When the measured time began, and the engine's count of steps then."""
        self._busy = self._holds_back = False

    def observe(self, stats: EngineStats, now: float, begun: Iterable[Ticket], *, holds_back: bool) -> None:
        """Take in a message of the engine: its state at `now`, and the requests that it has begun since the last one.

        `holds_back`: whether requests wait in the engine although it runs fewer sequences than it may.
        """
        was_busy, self._busy = self._busy, bool(stats.running or stats.waiting)
        held_back, self._holds_back = self._holds_back, holds_back
        seconds, steps = now - self._since, stats.steps - self._steps
        if was_busy and steps <= 0:
            return
        self._since, self._steps = now, stats.steps
        if not was_busy:
            return  # part of that time it had nothing to do
        self._steps_measured += steps
        self._step_seconds.add(seconds, steps, age=steps)
        if not (held_back and holds_back):
            self._held_seconds, self._held_steps = 0.0, 0
            return
        self._held_seconds += seconds
        self._held_steps += steps
        if tokens := sum(map(self._size, begun)):
            self._begun_tokens.add(tokens, self._held_seconds, age=self._held_steps)
            self._held_seconds, self._held_steps = 0.0, 0

    def ended(self, ticket: Ticket) -> None:
        """A request has its last token."""
        if ticket.may_stop:
            self._stops.add(ticket.stops, ticket.tokens, age=1)

    def seconds(self, running: Iterable[Ticket], waiting: Sequence[Ticket], count: int) -> float | None:
        """Wait of a request behind `waiting`, of which there are `count`; None while too little is measured."""
        taken = [self._left(ticket, self._steps - ticket.begun_step) for ticket in running for _ in range(ticket.width)]
        free = taken + [0.0] * (self._slots - len(taken))
        steps = _played(free, self._slots, [(ticket.width, self._left(ticket, 0)) for ticket in waiting])
        if steps == 0 and not self._holds_back:
            return 0.0
        if self._steps_measured < _LEAST_STEPS:
            return None
        wait = steps * self._step_seconds.value
        if self._holds_back and (begun := self._begun_tokens).numerator:
            per_token = (begun.denominator + self._held_seconds) / begun.numerator
            wait = max(wait, sum(map(self._size, waiting)) * per_token)
        return wait * count / len(waiting) if waiting else wait

    def _left(self, ticket: Ticket, done: int) -> float:
        """Tokens that a completion is expected to have still, `done` steps after it was begun.

        Where completions end by themselves, that is known only of many: each gets its part of their distribution, as
        if the next token were as probable to be the last one as any other.
        """
        most = max(1, ticket.max_tokens - done)
        if not ticket.may_stop:
            return most
        if not self._stops.denominator:
            return 0.0
        ends_per_token = self._stops.value  # 0 too where so few ended that the quotient is below the smallest number
        if ends_per_token == 0:
            return most
        part = ticket.number * _GOLDEN % 1
        return min(most, 1 + math.log1p(-part) / math.log1p(-min(0.99, ends_per_token)))

    def _size(self, ticket: Ticket) -> float:
        """Tokens of a request, prompt and outputs."""
        return len(ticket.prompt_token_ids) + ticket.width * self._left(ticket, 0)


def _played(free: list[float], slots: int, waiting: Iterable[tuple[int, float]]) -> float:
    """Steps until the next request begins, behind requests of (sequences, steps); `free` is when sequences end."""
    heapq.heapify(free)
    for _ in range(len(free) - slots):
        heapq.heappop(free)
    for width, steps in waiting:
        count = min(width, slots)
        begin = [heapq.heappop(free) for _ in range(count)][-1]
        for _ in range(count):
            heapq.heappush(free, begin + steps)
    return free[0]
