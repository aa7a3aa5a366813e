from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.config import SchedulerConfig
from hasten.core.errors import CapacityError
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence

if TYPE_CHECKING:
    from tests.engine.conftest import Shadow

SIZE = 4


@dataclass(frozen=True)
class Job:
    """A request: its prompt, completions, and how many tokens each is to have."""

    prompt: tuple[int, ...]
    n: int = 1
    output: int = 1
    arrives: int = 0
    """Step before which it comes."""
    leaves: int | None = None
    """Step before which it is withdrawn."""


@dataclass
class Run:
    """An engine without a model: the next token is worked out from those before it."""

    scheduler: Scheduler
    cache: Shadow
    wanted: dict[str, int] = field(default_factory=dict)
    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    first_seen: list[str] = field(default_factory=list)
    log: list[object] = field(default_factory=list)

    def add(self, name: str, job: Job) -> None:
        params = SamplingParams(n=job.n)
        self.wanted[name] = job.output
        self.scheduler.add(Sequence(Request(request_id=name, prompt_token_ids=job.prompt, params=params), seed=0))

    def abort(self, name: str) -> None:
        for sequence in list(self.scheduler._sequences.values()):
            if sequence.request_id == name:
                self.scheduler.finish(sequence.key)
        self.check()

    def check(self) -> None:
        scheduler = self.scheduler
        known = list(scheduler._sequences.values())
        assert {id(s) for s in known} == {id(s) for s in [*scheduler.running, *scheduler.waiting]}
        assert len(known) == len(scheduler.running) + len(scheduler.waiting)
        self.cache.check(known)

    def step(self) -> Batch:
        scheduler, config = self.scheduler, self.scheduler.config
        running_before = list(scheduler.running)
        batch = scheduler.schedule()
        assert 0 < batch.num_tokens <= config.max_num_batched_tokens
        assert len(batch.sequences) <= len(scheduler.running) <= config.max_num_seqs
        assert len({s.key for s in batch.sequences}) == len(batch.sequences)
        assert not {s.key for s in batch.sequences} & {s.key for s in batch.preempted}
        assert set(map(id, batch.sequences)) <= set(map(id, scheduler.running))
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            assert 1 <= count <= len(sequence.token_ids) - sequence.num_computed
        # the last to come give way first, and come back in their order
        left = len(running_before) - len(batch.preempted)
        assert running_before[left:] == batch.preempted[::-1] == list(scheduler.waiting)[: len(batch.preempted)]
        self.first_seen += [s.request_id for s in batch.sequences if s.request_id not in self.first_seen]
        self.log.append(
            [(s.key, s.index, n, list(s.block_table)) for s, n in zip(batch.sequences, batch.counts, strict=True)]
        )
        self.log += [batch.copies, [s.key for s in batch.preempted]]
        self.cache.run(batch)
        sampled = [batch.sequences[place] for place in batch.sampled()]
        scheduler.advance(batch)
        for sequence in sampled:
            sequence.token_ids.append(hash((sequence.index, *sequence.token_ids)) % 3)
            if sequence.output_len == self.wanted[sequence.request_id]:
                self.outputs[sequence.request_id, sequence.index] = sequence.output_token_ids
                scheduler.finish(sequence.key)
        self.check()
        return batch

    def run_all(self, jobs: list[Job]) -> None:
        """Until all is done; far fewer steps than this would do, so that a run that stands still fails."""
        steps = 0
        while steps <= max(job.arrives for job in jobs) or self.scheduler.has_work:
            for number, job in enumerate(jobs):
                if job.arrives == steps:
                    self.add(str(number), job)
                if job.leaves == steps:
                    self.abort(str(number))
            if self.scheduler.has_work:
                self.step()
            steps += 1
            assert steps < 2000
        assert self.scheduler.blocks.num_used == 0
        assert self.scheduler.schedule().sequences == []


MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def make_run(shadow: type[Shadow]) -> MakeRun:
    def make(blocks: int = 64, seqs: int = 8, tokens: int = 16, *, prefix_cache: bool = True) -> Run:
        manager = BlockManager(blocks, SIZE, enable_prefix_cache=prefix_cache)
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
        return Run(Scheduler(config, manager), shadow(manager))

    return make


def expected(jobs: list[Job]) -> dict[tuple[str, int], list[int]]:
    """What each completion is, worked out alone."""
    outputs = {}
    for number, job in enumerate(jobs):
        for index in range(job.n):
            tokens = list(job.prompt)
            for _ in range(job.output):
                tokens.append(hash((index, *tokens)) % 3)
            outputs[str(number), index] = tokens[len(job.prompt) :]
    return outputs


JOBS = st.lists(
    st.builds(
        Job,
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple),
        n=st.integers(1, 4),
        output=st.integers(1, 12),
        arrives=st.integers(0, 15),
    ),
    min_size=1,
    max_size=7,
)
LIMITS = st.fixed_dictionaries(
    {
        "blocks": st.integers(8, 30),
        "seqs": st.integers(1, 6),
        "tokens": st.integers(6, 40),
        "prefix_cache": st.booleans(),
    }
)


def test_scheduling_does_not_need_torch() -> None:
    program = "import sys, hasten.engine.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@given(jobs=JOBS, limits=LIMITS)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_whatever_comes_everything_ends_as_if_alone(make_run: MakeRun, jobs: list[Job], limits: dict[str, int]) -> None:
    run = make_run(**limits)
    run.run_all(jobs)
    assert run.outputs == expected(jobs)
    order = sorted(range(len(jobs)), key=lambda number: jobs[number].arrives)
    assert run.first_seen == [str(number) for number in order]


@given(jobs=JOBS, limits=LIMITS, leaves=st.lists(st.integers(0, 25), min_size=7, max_size=7))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whoever_is_withdrawn_whenever_the_others_end_as_if_alone(
    make_run: MakeRun, jobs: list[Job], limits: dict[str, int], leaves: list[int]
) -> None:
    last = len(jobs) - 1
    jobs = [
        Job(job.prompt, job.n, job.output, job.arrives, job.arrives + leave if number != last else None)
        for number, (job, leave) in enumerate(zip(jobs, leaves, strict=False))
    ]
    run = make_run(**limits)
    run.run_all(jobs)
    right = expected(jobs)
    assert {key: right[key] for key in run.outputs} == run.outputs
    assert {(str(last), index) for index in range(jobs[last].n)} <= set(run.outputs)


@given(jobs=JOBS, limits=LIMITS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_two_schedulers_of_the_same_requests_choose_the_same(
    make_run: MakeRun, jobs: list[Job], limits: dict[str, int]
) -> None:
    logs = []
    for _ in range(2):
        run = make_run(**limits)
        run.run_all(jobs)
        logs.append(run.log)
    assert logs[0] == logs[1]


def test_a_larger_load_under_pressure(make_run: MakeRun) -> None:
    rng = random.Random(3)
    jobs = [
        Job(
            tuple(rng.choices(range(2), k=rng.randint(1, 60))),
            n=rng.choice([1, 1, 1, 3]),
            output=rng.randint(1, 40),
            arrives=rng.randint(0, 60),
        )
        for _ in range(60)
    ]
    run = make_run(blocks=40, seqs=12, tokens=48)
    run.run_all(jobs)
    assert run.outputs == expected(jobs)
    assert run.scheduler.stats.preemptions > 0
    assert run.scheduler.blocks.prefix_hits > 0


def test_a_long_prompt_goes_in_chunks_beside_the_others(make_run: MakeRun) -> None:
    run = make_run(tokens=8)
    run.add("short", Job((1, 2), output=10))
    run.step()
    run.add("long", Job(tuple(range(20)), output=2))
    batches = [run.step() for _ in range(4)]
    assert {tuple(s.request_id for s in batch.sequences) for batch in batches} == {("short", "long")}
    assert [batch.counts for batch in batches] == [[1, 7], [1, 7], [1, 6], [1, 1]]


def test_only_as_many_run_as_may(make_run: MakeRun) -> None:
    run = make_run(seqs=2)
    for name in "abc":
        run.add(name, Job((1, 2), output=2))
    assert [s.request_id for s in run.step().sequences] == ["a", "b"]
    assert [s.request_id for s in run.step().sequences] == ["a", "b"]
    assert [s.request_id for s in run.step().sequences] == ["c"]


def test_the_last_to_come_gives_way_and_resumes_before_who_never_ran(make_run: MakeRun) -> None:
    run = make_run(blocks=4, prefix_cache=False)
    run.add("a", Job((1,) * 7, output=5))
    run.add("b", Job((2,) * 7, output=5))
    run.add("c", Job((3,) * 3, output=1))
    assert [s.request_id for s in run.step().sequences] == ["a", "b"]
    run.step()
    batch = run.step()
    assert [s.request_id for s in batch.sequences] == ["a"]
    assert [s.request_id for s in batch.preempted] == ["b"]
    assert run.scheduler.stats.preemptions == 1
    while run.scheduler.has_work:
        run.step()
    assert run.first_seen == ["a", "b", "c"]
    assert {key: len(ids) for key, ids in run.outputs.items()} == {("a", 0): 5, ("b", 0): 5, ("c", 0): 1}


def test_siblings_hold_the_prompt_once(make_run: MakeRun) -> None:
    run = make_run(blocks=20, tokens=32)
    run.add("a", Job(tuple(range(10)), n=5, output=3))
    run.step()
    assert run.scheduler.blocks.num_used == 3
    batch = run.step()
    assert [s.index for s in batch.sequences] == [0, 1, 2, 3, 4]
    assert batch.counts == [1] * 5  # only the prompt's last token is computed again
    assert len(batch.copies) == 4  # the last holder of a block keeps it
    assert run.scheduler.blocks.num_used == 2 + 5


def test_who_waits_with_blocks_gives_them_up_before_a_running_one_must(make_run: MakeRun) -> None:
    run = make_run(blocks=6, seqs=1, prefix_cache=False)
    run.add("a", Job((1,) * 8, n=3, output=16))
    while run.scheduler.has_work:
        run.step()
    # the siblings wait with the prompt's blocks; the first needs all 6 in the end
    assert {key: len(ids) for key, ids in run.outputs.items()} == {("a", index): 16 for index in range(3)}
    assert run.scheduler.stats.preemptions == 0


def test_siblings_of_a_prompt_that_fills_the_cache_run_one_by_one(make_run: MakeRun) -> None:
    run = make_run(blocks=2, seqs=1, prefix_cache=False)
    jobs = [Job((1,) * 7, n=3, output=1)]
    run.run_all(jobs)  # nothing runs when the first sibling needs a copy of what the others hold
    assert run.outputs == expected(jobs)


def test_a_cache_too_small_for_one_sequence_says_what_to_change(make_run: MakeRun) -> None:
    run = make_run(blocks=2)
    run.add("a", Job((1,) * 9))
    with pytest.raises(CapacityError, match=r"2 blocks.*lower max_model_len or give the cache more memory"):
        run.scheduler.schedule()


def test_finishing_what_is_not_there_does_nothing(make_run: MakeRun) -> None:
    run = make_run()
    run.add("a", Job((1, 2, 3)))
    run.scheduler.finish(77)
    assert run.scheduler.get(77) is None
    assert run.scheduler.get(0) is not None
    run.step()
    run.scheduler.finish(0)
    assert not run.scheduler.has_work
