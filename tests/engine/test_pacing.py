"""The model of step times, and the limits that follow from it, under a clock that is modelled too."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.config import SchedulerConfig
from hasten.core.types import Request, SamplingParams
from hasten.engine.block_manager import BlockManager
from hasten.engine.pacing import PacedStep, Pacer, StepTimes, StepWork
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence

MAX_TOKENS = 2048
Device = Callable[[StepWork], float]
"""Seconds of a step."""


def compute_bound(work: StepWork) -> float:
    """A GPU whose time grows with every token."""
    mixed = 1.5e-3 if work.prompt_tokens else 0.0
    return 3.5e-3 + mixed + 21e-6 * (work.rows + work.prompt_tokens) + 0.11e-6 * work.keys


def launch_bound(work: StepWork) -> float:
    """A GPU that waits for the launches of a step with prompts, whatever its size, until that is large."""
    return max(14e-3, compute_bound(work)) if work.prompt_tokens else compute_bound(work)


def slow(work: StepWork) -> float:
    """A CPU, a hundred times as slow, whose decodes cost more than tokens of prompts."""
    return 2e-3 + 0.3e-3 * work.rows + 0.1e-3 * work.prompt_tokens + 2e-6 * work.keys


DEVICES: list[Device] = [compute_bound, launch_bound, slow]


def some_work(rng: random.Random) -> StepWork:
    rows = rng.randint(0, 100)
    tokens = rng.choice([0, 0, 0, rng.randint(2, 600), rng.randint(2, 600), rng.randint(2, MAX_TOKENS)])
    return StepWork(max(rows, tokens == 0), rows * rng.randint(50, 400), tokens)


@pytest.mark.parametrize("device", DEVICES)
def test_times_of_any_device_are_learned_from_its_steps(device: Device) -> None:
    rng, times = random.Random(1), StepTimes(MAX_TOKENS)
    for _ in range(1500):
        work = some_work(rng)
        times.observe(work, device(work) * rng.lognormvariate(0, 0.1))
    ratios = sorted(times.predict(work) / device(work) for work in (some_work(rng) for _ in range(300)))
    assert 0.85 < ratios[150] < 1.15
    assert ratios[15] > 0.6
    assert ratios[-15] < 1.6


def test_a_first_step_that_was_slow_is_soon_forgotten() -> None:
    rng, times = random.Random(2), StepTimes(MAX_TOKENS)
    times.observe(StepWork(0, 0, 100), 50 * compute_bound(StepWork(0, 0, 100)))
    work = StepWork(20, 4000, 300)
    for _ in range(20):
        decodes = StepWork(20, 4000 + rng.randint(0, 100), 0)
        times.observe(decodes, compute_bound(decodes))
        times.observe(work, compute_bound(work))
    assert times.predict(work) == pytest.approx(compute_bound(work), rel=0.2)


def test_a_step_that_stalled_hardly_changes_what_is_predicted() -> None:
    rng, times = random.Random(3), StepTimes(MAX_TOKENS)
    for _ in range(300):
        work = some_work(rng)
        times.observe(work, compute_bound(work))
    work = StepWork(20, 4000, 300)
    before = times.predict(work)
    times.observe(work, 1000 * before)
    assert before < times.predict(work) < 1.2 * before


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 5 * MAX_TOKENS), st.floats(0, 100)), min_size=1, max_size=40
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_whatever_was_measured_more_tokens_take_no_less_time_and_each_no_more(
    steps: list[tuple[int, int, float]],
) -> None:
    times = StepTimes(MAX_TOKENS)
    for rows, tokens, seconds in steps:
        times.observe(StepWork(rows, 10 * rows, tokens), seconds)
    sizes = [1, 32, 33, 64, 100, 500, 1000, MAX_TOKENS, 3 * MAX_TOKENS]
    extra = [times.extra(size) for size in sizes]
    tolerance = 1 + 1e-9
    for (size, less), (larger, more) in pairwise(zip(sizes, extra, strict=True)):
        assert less <= more * tolerance
        assert more <= less * max(larger, 32) / max(size, 32) * tolerance
    decodes = StepWork(3, 100, 0)
    most = times.max_prompt_tokens(decodes, 0, times.predict(StepWork(3, 100, 200)) * tolerance)
    assert most >= 200 or extra[0] == extra[-1]


def test_work_counts_decodes_contexts_and_tiles_of_prompts() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512), BlockManager(100, 16))
    scheduler.add(sequence("short", 10, 5))
    scheduler.advance(batch := scheduler.schedule())
    assert batch.counts == [10]
    scheduler.running[0].append(1)
    scheduler.add(sequence("long", 256, 5))
    assert StepWork.of(scheduler.schedule()) == StepWork(rows=1, keys=11 + 128 * 4, prompt_tokens=256)


def sequence(name: str, length: int, output: int, arrived: float = 0.0) -> Sequence:
    request = Request(request_id=name, prompt_token_ids=tuple(range(length)), params=SamplingParams(max_tokens=output))
    result = Sequence(request, 0)
    result.arrived = arrived
    return result


@dataclass
class Server:
    """An engine whose steps take the time that a device model says."""

    device: Device
    target: float
    now: float = 0.0
    times: list[tuple[StepWork, int | None, float]] = field(default_factory=list)
    """Work, limit and seconds of each step."""
    first_token: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=MAX_TOKENS)
        self.scheduler = Scheduler(config, BlockManager(4000, 16, enable_prefix_caching=False))
        self.pacer = Pacer(self.target, MAX_TOKENS)

    def step(self, *added: Sequence) -> None:
        for new in added:
            new.due = self.pacer.due(new, self.scheduler)
            self.scheduler.add(new)
        limit = self.pacer.prompt_tokens(self.scheduler, self.now)
        batch = self.scheduler.schedule(limit)
        if not batch.sequences:
            return
        work = StepWork.of(batch)
        step = self.pacer.begin(batch, limit)
        seconds = self.device(work)
        self.now += seconds
        self.times.append((work, limit, seconds))
        self.scheduler.advance(batch)
        if step is not None:
            self.pacer.observe(step, seconds)
        for index in batch.sampled:
            landed = batch.sequences[index]
            landed.append(1)
            self.first_token.setdefault(landed.request_id, self.now)
            if landed.is_complete:
                self.scheduler.finish(landed.key)

    def warm_up(self) -> None:
        """Some requests of all sizes, one after the other, beside one that decodes."""
        self.step(sequence("decoding", 20, 2000, self.now))
        for number, length in enumerate([50, 300, 600, 100, 900, 200] * 6):
            self.step(sequence(f"warm {number}", length, 2, self.now))
            for _ in range(8):
                self.step()
        self.times.clear()


@pytest.mark.parametrize("device", DEVICES)
def test_steps_with_prompts_keep_to_the_target(device: Device) -> None:
    server = Server(device, target=0.03)
    server.warm_up()
    server.step(sequence("long", 6000, 2, server.now))
    while "long" not in server.first_token:
        server.step()
    mixed = [(work, seconds) for work, _, seconds in server.times if work.prompt_tokens]
    assert len(mixed) > 6000 // MAX_TOKENS  # in more parts than without a target
    for work, seconds in mixed[:3]:  # before it is late
        alone = device(StepWork(work.rows, work.rows * 60, 1))
        assert seconds < 1.25 * max(0.03, 2 * alone)
        assert seconds > 0.5 * max(0.03, 2 * alone) or work is mixed[-1][0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_target_below_the_time_of_any_step_still_leaves_prompts_half_of_it(device: Device) -> None:
    server = Server(device, target=1e-6)
    server.warm_up()
    server.step(sequence("long", 1500, 2, server.now))
    while "long" not in server.first_token:
        server.step()
        assert len(server.times) < 200
    for work, _, seconds in server.times:
        assert seconds < 8 * device(StepWork(work.rows, work.keys, 1))


def test_nothing_is_limited_without_a_target_or_a_decode_or_anything_known() -> None:
    new = sequence("new", 5000, 2)
    server = Server(compute_bound, target=0.0)
    server.warm_up()
    server.step(new)
    assert new.due == 0
    assert {limit for _, limit, _ in server.times} == {None}
    assert server.pacer.stats.mixed_steps == 0
    server = Server(compute_bound, target=0.01)
    server.step(sequence("first", 500, 3))
    server.step(sequence("second", 500, 3))
    first, second = server.times
    assert first[1] is None  # nothing is known
    assert second[1] is not None
    while server.scheduler.has_work:
        server.step()
    server.times.clear()
    server.step(sequence("alone", MAX_TOKENS, 1))
    assert server.times == [(StepWork(0, MAX_TOKENS // 2 * MAX_TOKENS // 64, MAX_TOKENS), None, server.times[0][2])]


def test_prompts_that_wait_for_long_make_steps_longer() -> None:
    server = Server(compute_bound, target=0.02)
    server.warm_up()
    waiting = [sequence(str(number), 2000, 2, server.now) for number in range(10)]
    pacer, scheduler = server.pacer, server.scheduler
    scheduler.add(waiting[0])
    late = pacer.prompt_tokens(scheduler, server.now + 1)
    for new in waiting[1:]:
        scheduler.add(new)
    soon = pacer.prompt_tokens(scheduler, server.now)
    all_late = pacer.prompt_tokens(scheduler, server.now + 1)
    assert soon is not None
    assert late is not None
    assert all_late is not None
    assert 1.5 * soon < late < 3 * soon
    assert all_late == MAX_TOKENS


def test_what_has_begun_to_answer_is_not_late() -> None:
    """Tokens that a grammar forced are computed like a prompt, however long ago the request came."""
    server = Server(compute_bound, target=0.02)
    server.warm_up()
    answering = sequence("answering", 2000, 20, server.now)
    server.scheduler.add(answering)
    soon = server.pacer.prompt_tokens(server.scheduler, server.now)
    answering.append(1)
    assert server.pacer.prompt_tokens(server.scheduler, server.now + 1) == soon


def test_beams_whose_prompt_is_not_computed_do_not_decode() -> None:
    server = Server(compute_bound, target=0.02)
    server.warm_up()
    while server.scheduler.has_work:
        server.step()
    params = SamplingParams(max_tokens=4, beam_width=4)
    beams = Sequence(Request(request_id="beams", prompt_token_ids=tuple(range(3 * MAX_TOKENS)), params=params), 0)
    server.times.clear()
    for _ in range(3):
        server.step(*([beams] if not server.times else []))
    assert [(work.prompt_tokens, limit) for work, limit, _ in server.times] == [(MAX_TOKENS, None)] * 3


def test_beams_that_wait_for_their_moves_decode() -> None:
    server = Server(compute_bound, target=0.02)
    server.warm_up()
    while server.scheduler.has_work:
        server.step()
    params = SamplingParams(max_tokens=4, beam_width=4)
    leader = Sequence(Request(request_id="beams", prompt_token_ids=tuple(range(20)), params=params), 0)
    server.scheduler.add(leader)
    server.scheduler.advance(server.scheduler.schedule())
    assert leader.beams is not None
    leader.beams.scattered = False
    for beam in leader.beams.members:
        beam.num_computed = beam.length
    assert [beam.uncomputed for beam in server.scheduler.running] == [0] * 4
    server.scheduler.add(sequence("new", 5000, 2))
    assert server.pacer.prompt_tokens(server.scheduler, server.now) is not None


def test_no_prompt_starves_under_a_load_of_short_ones() -> None:
    server, rng = Server(compute_bound, target=0.02), random.Random(5)
    server.warm_up()
    server.step(sequence("long", 4000, 2, server.now))
    began, number = server.now, 0
    while "long" not in server.first_token:
        # more prompt tokens come than the steps take
        server.step(*(sequence(f"short {number + i}", rng.randint(200, 600), 2, server.now) for i in range(3)))
        number += 3
        assert number < 600
    alone = 4000 * 21e-6
    assert server.first_token["long"] - began < 12 * alone
    assert any(name.startswith("short") for name in server.first_token)


def test_counters_say_what_was_predicted_and_cut() -> None:
    server = Server(compute_bound, target=0.02)
    server.warm_up()
    before = astuple(server.pacer.stats)
    server.step(sequence("long", 3000, 2, server.now))
    server.step()
    since = [now - then for now, then in zip(astuple(server.pacer.stats), before, strict=True)]
    measured = sum(seconds for _, _, seconds in server.times)
    assert since == [2, 2, pytest.approx(measured), pytest.approx(measured, rel=0.2)]


def test_steps_without_prompts_are_measured_now_and_then_once_they_are_known() -> None:
    server = Server(compute_bound, target=0.02)
    server.warm_up()
    before = server.pacer.times.observed
    for _ in range(80):
        server.step()
    assert server.pacer.times.observed == before + 10
    server.device = lambda work: 3 * compute_bound(work)
    for _ in range(160):
        server.step()
    work, _, seconds = server.times[-1]
    assert server.pacer.times.predict(work) == pytest.approx(seconds, rel=0.1)
    server.step(sequence("prompt", 50, 2, server.now))
    assert server.pacer.times.observed == before + 31


def test_a_step_is_measured_from_when_it_begins() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512), BlockManager(100, 16))
    scheduler.add(sequence("a", 10, 5))
    batch = scheduler.schedule()
    assert Pacer(0.0, 512).begin(batch, None) is None
    step = Pacer(0.01, 512).begin(batch, 7)
    assert step == PacedStep(StepWork(0, 0, 10), 7, step.began if step else 0)
