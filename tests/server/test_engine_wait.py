"""Estimated waits, compared with those of an engine that is played step by step."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

import pytest

from hasten.core.types import FinishReason
from hasten.engine.stats import EngineStats
from hasten.server.engine.queue import QueueLimits, QueueWaitError, RequestQueue
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wait import MOST_SIMULATED, RecentRatio, WaitEstimator
from hasten.server.engine.wire import CompletionDelta, Output, Step

STEP_S = 0.01


@dataclass
class Run:
    """A request in the played engine."""

    ticket: Ticket
    left: int
    """Tokens that it will still have, which the queue cannot know."""


class PlayedEngine:
    """Gives each request that it runs a token a step; at most `begins` requests begin in one."""

    def __init__(self, places: int, *, begins: int = 1000) -> None:
        self.queue = RequestQueue(QueueLimits())
        (self.engine,) = self.queue.engines
        self.engine.attach(places, 0, 16)
        self.now = 0.0
        self.waits: dict[int, float] = {}
        """By the request's number: seconds until it was begun."""
        self._places = places
        self.begins = begins
        self._steps = self._numbers = 0
        self._came: dict[int, float] = {}
        self._lengths: dict[int, int] = {}
        self._waiting: list[Ticket] = []
        self._running: list[Run] = []

    def add(self, length: int, most: int | None = None, priority: int = 0, timeout: float = 0.0) -> int:
        """A request that will have so many tokens; with `most`, the queue knows only that there are no more."""
        self._numbers += 1
        ticket = Ticket(self._numbers, (1,) * 8, 1, bytearray(), priority, most or length, most is not None, timeout)
        self.queue.put(ticket)
        self._came[ticket.number], self._lengths[ticket.number] = self.now, length
        self._waiting += self.queue.assign_next()
        return ticket.number

    def step(self) -> None:
        room = min(self.begins, self._places - len(self._running))
        started, self._waiting = self._waiting[:room], self._waiting[room:]
        self._running += [Run(ticket, self._lengths[ticket.number]) for ticket in started]
        for ticket in started:
            self.waits[ticket.number] = self.now - self._came[ticket.number]
        began, self.now, self._steps = self.now, self.now + STEP_S, self._steps + 1
        for run in self._running:
            run.left -= 1
        ended = [run for run in self._running if run.left == 0]
        self._running = [run for run in self._running if run.left]
        stats = EngineStats(running=len(self._running), waiting=len(self._waiting), steps=self._steps)
        self.engine.observe(Step(stats, started=dict.fromkeys((ticket.number for ticket in started), began)), self.now)
        for run in ended:
            self._end(run.ticket)
        self._waiting += self.queue.assign_next()

    def _end(self, ticket: Ticket) -> None:
        length = self._lengths[ticket.number]
        reason = FinishReason.STOP if length < ticket.max_tokens else FinishReason.LENGTH
        delta = CompletionDelta(0, [7] * length, "", finish_reason=reason)
        ticket.push(Output(ticket.number, [delta], finished=True))
        self.engine.finish(ticket)

    def measured(self) -> "PlayedEngine":
        """The same once it has run for a while."""
        self.add(100)
        self.until_idle()
        return self

    def give_up(self, timeout: float) -> int:
        """Take out what has waited for longer than `timeout` seconds; how many they are."""
        late = [ticket for ticket in self._waiting if self.now - self._came[ticket.number] > timeout]
        for ticket in late:
            self._waiting.remove(ticket)
            self.queue.remove(ticket)
        return len(late)

    def until_idle(self) -> None:
        while not self.queue.is_empty:
            self.step()

    def wait_of(self, number: int) -> float:
        """Play on until a request is begun."""
        while number not in self.waits:
            self.step()
        return self.waits[number]


def test_nothing_is_known_before_some_steps_are_measured_and_nobody_is_refused() -> None:
    engine = PlayedEngine(1)
    assert engine.queue.estimated_wait() == 0
    engine.add(1000)
    assert engine.queue.estimated_wait() is None
    engine.add(1000, timeout=0.001)
    for _ in range(20):
        engine.step()
    assert (engine.queue.estimated_wait() or 0) > 19
    with pytest.raises(QueueWaitError, match=r"would wait for about 20 s, and may wait for 19 s"):
        engine.add(1, timeout=19)


def test_a_burst_is_taken_as_far_as_it_can_be_begun_in_time() -> None:
    """64 equal requests run; the next 64 begin when these end, and the third 64 after them."""
    engine = PlayedEngine(64).measured()
    for _ in range(64):
        engine.add(100, timeout=0.001)
    engine.step()
    seconds = 100 * STEP_S
    for _ in range(64):
        engine.add(100, timeout=1.05 * seconds)
    with pytest.raises(QueueWaitError):
        engine.add(100, timeout=1.9 * seconds)
    last = engine.add(100, timeout=2.05 * seconds)
    assert engine.wait_of(last) == pytest.approx(2 * seconds, abs=2 * STEP_S)


@pytest.mark.parametrize("number", [1, 10, 100, 2 * MOST_SIMULATED])
def test_known_lengths_give_the_wait_exactly(number: int) -> None:
    engine, rng = PlayedEngine(16).measured(), random.Random(number)
    for _ in range(16 + number):
        engine.add(rng.randint(5, 60))
    for _ in range(3):
        engine.step()
    estimate = engine.queue.estimated_wait()
    assert estimate is not None
    within = 0.15 if number > MOST_SIMULATED else 0.02
    assert estimate == pytest.approx(engine.wait_of(engine.add(1)), rel=within, abs=3 * STEP_S)


@pytest.mark.parametrize("mean", [20, 100])
def test_lengths_that_are_not_known_give_the_wait_on_the_average(mean: int) -> None:
    """Requests of up to 1000 tokens that end by themselves; twice as many come as the engine can do."""
    engine, rng = PlayedEngine(16), random.Random(mean)
    estimates, requested = [], []
    for count in range(80 * mean):
        if count % max(1, mean // 32) == 0 and engine.queue.num_waiting < 200:
            engine.add(min(999, 1 + int(rng.expovariate(1 / mean))), most=1000)
        if count > 30 * mean and count % mean == 0:
            estimates.append(engine.queue.estimated_wait() or 0.0)
            requested.append(engine.add(1, most=1000))
        engine.step()
    waits = [engine.wait_of(number) for number in requested]
    assert fmean(estimates) == pytest.approx(fmean(waits), rel=0.3)
    assert min(estimates) > 0


def test_a_queue_of_prompts_begins_at_the_rate_at_which_it_did() -> None:
    """Places are free, but a step takes only two prompts."""
    engine = PlayedEngine(1000, begins=2).measured()
    for _ in range(600):
        engine.add(4)
    assert engine.queue.estimated_wait() == 0  # as far as is known
    for _ in range(40):
        engine.step()
    estimate = engine.queue.estimated_wait()
    assert estimate is not None
    assert estimate == pytest.approx(engine.wait_of(engine.add(4)), rel=0.2)


@dataclass
class Served:
    """What came of requests that may wait for a second, per second."""

    good: float
    refused: float
    given_up: float


def under_load(multiple: float, *, known: bool) -> Served:
    """Poisson arrivals at a multiple of what 16 sequences of 64 tokens on the average can do."""
    engine, rng, seconds = PlayedEngine(16), random.Random(7), 60
    rate, refused, given_up, taken = multiple * 16 / (64 * STEP_S), 0, 0, list[int]()
    at = 0.0
    while engine.now < seconds:
        while at < engine.now:
            at += rng.expovariate(rate)
            try:
                length = rng.randint(32, 96) if known else min(299, 1 + int(rng.expovariate(1 / 64)))
                taken.append(engine.add(length, most=None if known else 300, timeout=1.0))
            except QueueWaitError:
                refused += 1
        engine.step()
        given_up += engine.give_up(1.0)
    return Served(len(engine.waits) / seconds, refused / seconds, given_up / seconds)


@pytest.mark.parametrize("known", [True, False])
def test_goodput_stays_at_its_best_however_many_come(known: bool) -> None:
    calm, full, thrice = (under_load(multiple, known=known) for multiple in (0.7, 1.0, 3.0))
    assert calm.refused + calm.given_up < 0.01 * calm.good, "they would have been served"
    assert full.refused + full.given_up < 0.15 * full.good
    assert thrice.good >= 0.95 * full.good
    assert thrice.good >= 0.95 * 25, "of what it can do"
    assert thrice.given_up < (0.01 if known else 0.4) * thrice.good, "they might have been refused at once"


def test_who_goes_first_waits_for_those_in_front_alone() -> None:
    engine = PlayedEngine(1).measured()
    for priority in (1, 1, 0, 2, 2, 2):
        engine.add(100, priority=priority)
    engine.step()
    estimates = [engine.queue.estimated_wait(priority) or 0.0 for priority in (1, 0, 2, 3)]
    assert estimates == [pytest.approx(steps * STEP_S, abs=2 * STEP_S) for steps in (199, 299, 599, 599)]
    with pytest.raises(QueueWaitError):
        engine.add(100, timeout=2.5)
    engine.add(100, priority=1, timeout=2.5)


@pytest.mark.parametrize("slow", [10, 1000])
def test_an_estimate_recovers_from_a_slow_step(slow: int) -> None:
    engine = PlayedEngine(4).measured()
    for _ in range(400):
        engine.add(10)
    engine.now += slow * STEP_S  # the machine stood still
    engine.step()
    for _ in range(700):
        engine.step()
    right = engine.wait_of(engine.add(1))
    for _ in range(400):
        engine.add(10)
    assert (engine.queue.estimated_wait() or 0) == pytest.approx(100 * 10 * STEP_S, rel=0.1)
    assert right > 0


def test_an_engine_that_was_idle_is_not_slow() -> None:
    engine = PlayedEngine(1).measured()
    engine.now += 1000
    engine.add(100)
    engine.step()
    assert engine.queue.estimated_wait() == pytest.approx(99 * STEP_S, rel=0.05)


def changes(engine: PlayedEngine) -> Iterator[tuple[str, Callable[[], object]]]:
    first = engine.add(50)
    yield "a step", engine.step
    yield "a request more", lambda: engine.add(50)
    ticket = engine.engine.get(first)
    assert ticket is not None
    yield "grammar", lambda: engine.engine.set_compiling(ticket, compiling=True)
    yield "a request less", lambda: engine.queue.remove(ticket)
    yield "a new process", lambda: engine.engine.attach(1, 0, 16)


def test_whatever_happens_an_estimate_is_of_now() -> None:
    engine = PlayedEngine(1).measured()
    engine.add(50)
    engine.step()
    for name, change in changes(engine):
        engine.queue.estimated_wait()
        change()
        known = engine.queue.estimated_wait()
        engine.queue._estimates.clear()
        assert engine.queue.estimated_wait() == known, name


def test_an_estimate_grows_no_faster_than_time_while_nothing_begins() -> None:
    """The cache is full: places are free, and none of those that wait can be begun."""
    engine = PlayedEngine(1000, begins=2).measured()
    for _ in range(600):
        engine.add(10_000)
    for _ in range(40):
        engine.step()
    before, since = engine.queue.estimated_wait(), engine.now
    engine.begins = 0
    for _ in range(5000):
        engine.step()
    after = engine.queue.estimated_wait()
    assert before is not None
    assert after is not None
    assert before < after < before * (1 + (engine.now - since) / (40 * STEP_S)) * 1.2


def test_one_end_before_very_many_requests_without_any_counts_no_more() -> None:
    estimator = WaitEstimator(1)
    ticket = Ticket(1, (1,), 1, bytearray(), max_tokens=8, may_stop=True)
    ticket.tokens, ticket.stops = 8, 1
    estimator.ended(ticket)
    ticket.stops = 0
    for _ in range(150_000):
        estimator.ended(ticket)
    estimator.observe(EngineStats(running=1), 0.0, (), holds_back=False)
    estimator.observe(EngineStats(running=1, steps=100), 100 * STEP_S, (), holds_back=False)
    assert estimator.seconds((), [ticket], 1) == pytest.approx(8 * STEP_S)


def test_a_recent_ratio_forgets() -> None:
    ratio = RecentRatio(half_life=10)
    assert ratio.value == 0
    ratio.add(100, 1, age=1)
    ratio.add(10, 10, age=10)
    assert ratio.value == pytest.approx((100 / 2 + 10) / (1 / 2 + 10))
