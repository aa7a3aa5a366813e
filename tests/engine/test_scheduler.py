from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.waiting import LIMIT_S

from hasten.core.config import SchedulerConfig
from hasten.core.errors import CapacityError
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from tests.engine.conftest import Follower, Shadow

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
    more: int = 0
    """Tokens that it might have had beyond `output`: with any, only its last token says that it ends."""
    penalized: bool = False
    """Whether its tokens must be known before the next one is chosen."""


def next_token(sequence: Sequence) -> int:
    return hash((sequence.index, *sequence.token_ids)) % 3


def record(batch: Batch) -> list[object]:
    """All that a step consists of."""
    work = [(s.key, s.index, n, list(s.block_table)) for s, n in zip(batch.sequences, batch.counts, strict=True)]
    return [work, batch.needed, batch.sampled, batch.copies, [s.key for s in batch.preempted]]


@dataclass
class Run:
    """An engine without a model: the next token is worked out from those before it.

    With `overlap`, what a step chose is told to the scheduler after the next one is launched. Another rank follows.
    """

    scheduler: Scheduler
    cache: Shadow
    follower: Follower
    overlap: bool = False
    prompt_tokens: int | None = None
    """Limit of prompt tokens per step; with one, short prompts overtake long ones."""
    wanted: dict[str, Job] = field(default_factory=dict)
    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    first_seen: list[str] = field(default_factory=list)
    log: list[object] = field(default_factory=list)
    flight: list[tuple[Sequence, int]] = field(default_factory=list)
    """What the last launched step chose: the device still has it, and perhaps the device alone."""
    collected: bool = True

    def add(self, name: str, job: Job) -> None:
        params = SamplingParams(
            n=job.n, max_tokens=job.output + job.more, repetition_penalty=2.0 if job.penalized else 1.0
        )
        self.wanted[name] = job
        sequence = Sequence(Request(request_id=name, prompt_token_ids=job.prompt, params=params), seed=0)
        if self.prompt_tokens is not None:
            sequence.due = self.scheduler.prompt_tokens + sequence.length
        self.scheduler.add(sequence)

    def abort(self, name: str) -> None:
        for sequence in list(self.scheduler._sequences.values()):
            if sequence.request_id == name:
                self.finish(sequence)
        self.check()

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence.key)
        self.follower.rows.release(sequence.key)

    @contextmanager
    def as_the_device_knows_them(self) -> Iterator[None]:
        """Sequences with their pending tokens in place, which no scheduler may see."""
        pending = [] if self.collected else [(s, token) for s, token in self.flight if s.pending]
        for sequence, token in pending:
            sequence.token_ids.append(token)
        yield
        for sequence, _ in pending:
            sequence.token_ids.pop()

    def check(self) -> None:
        scheduler = self.scheduler
        known = [sequence for sequence in scheduler._sequences.values() if not sequence.is_complete]
        assert {id(s) for s in known} == {id(s) for s in [*scheduler.running, *scheduler.waiting]}
        assert len(known) == len(scheduler.running) + len(scheduler.waiting)
        assert all(sequence.pending <= self.overlap for sequence in known)
        with self.as_the_device_knows_them():
            self.cache.check(known)

    def schedule(self) -> Batch:
        scheduler = self.scheduler
        running_before = list(scheduler.running)
        decoding = {s.key for s in running_before if not s.is_prefilling}
        batch = scheduler.schedule(self.prompt_tokens)
        prompts = sum(n for s, n in zip(batch.sequences, batch.counts, strict=True) if s.key not in decoding)
        assert self.prompt_tokens is None or prompts <= self.prompt_tokens
        assert len(batch.sequences) <= len(scheduler.running) <= scheduler.config.max_num_seqs
        assert batch.num_tokens <= scheduler._max_tokens
        assert batch.sequences or not (scheduler.running or scheduler.waiting)
        assert len({s.key for s in batch.sequences}) == len(batch.sequences)
        assert not {s.key for s in batch.sequences} & {s.key for s in batch.preempted}
        assert set(map(id, batch.sequences)) <= set(map(id, scheduler.running))
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            assert 1 <= count <= sequence.length - sequence.num_computed
            if sequence.pending:
                assert count == 1
                assert self.flight[sequence.pending_row][0] is sequence
        # the last to come give way first, and come back in their order
        left = len(running_before) - len(batch.preempted)
        assert running_before[left:] == batch.preempted[::-1] == list(scheduler.waiting)[: len(batch.preempted)]
        return batch

    def step(self) -> Batch:
        if any(self.wanted[sequence.request_id].penalized for sequence, _ in self.flight):
            self.collect()
        batch = self.schedule()
        self.first_seen += [s.request_id for s in batch.sequences if s.request_id not in self.first_seen]
        self.log.append(record(batch))
        self.follower.follow(batch)
        with self.as_the_device_knows_them():
            self.cache.run(batch)
            chosen = [(sequence, next_token(sequence)) for sequence in (batch.sequences[i] for i in batch.sampled)]
        self.scheduler.advance(batch)
        self.collect()
        self.flight, self.collected = chosen, False
        if not self.overlap:
            self.collect()
        self.check()
        return batch

    def collect(self) -> None:
        """Tell the scheduler what the last launched step chose, but for those who have ended since."""
        landed = [] if self.collected else self.flight
        self.collected = True
        for sequence, token in landed:
            if self.scheduler.get(sequence.key) is None:
                continue
            sequence.append(token)
            output = sequence.token_ids[sequence.prompt_len :]
            if len(output) == self.wanted[sequence.request_id].output:
                self.outputs[sequence.request_id, sequence.index] = output
                self.finish(sequence)

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
        assert not self.scheduler.has_work
        assert self.scheduler.schedule().sequences == []


MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def make_run(shadow: type[Shadow], make_follower: type[Follower]) -> MakeRun:
    def make(
        blocks: int = 64,
        seqs: int = 8,
        tokens: int = 16,
        *,
        prefix_cache: bool = True,
        overlap: bool = False,
        prompt_tokens: int | None = None,
    ) -> Run:
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
        manager = BlockManager(blocks, SIZE, enable_prefix_caching=prefix_cache)
        return Run(Scheduler(config, manager), shadow(manager), make_follower(seqs), overlap, prompt_tokens)

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
        more=st.sampled_from([0, 0, 1, 5]),
        penalized=st.sampled_from([False, False, False, False, True]),
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
        "overlap": st.booleans(),
        "prompt_tokens": st.sampled_from([None, None, 1, 5, 12]),
    }
)


def test_scheduling_does_not_need_torch() -> None:
    program = "import sys, hasten.engine.scheduler, hasten.engine.pacing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LIMIT_S)


@given(jobs=JOBS, limits=LIMITS)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_whatever_comes_everything_ends_as_if_alone(make_run: MakeRun, jobs: list[Job], limits: dict[str, int]) -> None:
    run = make_run(**limits)
    run.run_all(jobs)
    assert run.outputs == expected(jobs)
    if run.prompt_tokens is None:
        order = sorted(range(len(jobs)), key=lambda number: jobs[number].arrives)
        assert run.first_seen == [str(number) for number in order]


@given(jobs=JOBS, limits=LIMITS, leaves=st.lists(st.integers(0, 25), min_size=7, max_size=7))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whoever_is_withdrawn_whenever_the_others_end_as_if_alone(
    make_run: MakeRun, jobs: list[Job], limits: dict[str, int], leaves: list[int]
) -> None:
    last = len(jobs) - 1
    jobs = [
        replace(job, leaves=job.arrives + leave if number != last else None)
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


@pytest.mark.parametrize("prompt_tokens", [None, 1, 7])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_larger_load_under_pressure(make_run: MakeRun, overlap: bool, prompt_tokens: int | None) -> None:
    rng = random.Random(3)
    jobs = [
        Job(
            tuple(rng.choices(range(2), k=rng.randint(1, 60))),
            n=rng.choice([1, 1, 1, 3]),
            output=rng.randint(1, 40),
            arrives=rng.randint(0, 60),
            more=rng.choice([0, 20]),
        )
        for _ in range(60)
    ]
    run = make_run(blocks=40, seqs=12, tokens=48, overlap=overlap, prompt_tokens=prompt_tokens)
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


def test_short_prompts_overtake_the_rest_of_a_long_one_but_not_forever(make_run: MakeRun) -> None:
    run = make_run(blocks=200, seqs=40, tokens=64, prompt_tokens=4)
    run.add("decoding", Job((1, 2), output=60))
    run.step()
    run.add("long", Job(tuple(range(40)), output=1))
    run.step()
    arrived = 0
    while ("long", 0) not in run.outputs:
        run.add(f"short {arrived}", Job((arrived, 1, 1, 1), output=1))  # as many tokens as a step may have
        arrived += 1
        run.step()
        assert arrived < 100
    # as many tokens as the long prompt has came before its rest, and no more
    overtaking = [s for s in run.first_seen if s.startswith("short")]
    assert 40 - 2 * 4 <= 4 * len(overtaking) <= 40 + 2 * 4
    assert set(overtaking) == {f"short {number}" for number in range(len(overtaking))}


def test_a_limit_holds_back_prompts_and_no_decodes(make_run: MakeRun) -> None:
    run = make_run(seqs=8, tokens=64, prompt_tokens=3)
    for name in "abcd":
        run.add(name, Job((1,), output=30))
    while len(run.first_seen) < 4:
        run.step()
    run.add("long", Job(tuple(range(8)), output=1))
    assert [run.step().counts for _ in range(3)] == [[1, 1, 1, 1, 3], [1, 1, 1, 1, 3], [1, 1, 1, 1, 2]]


def test_prompts_that_cannot_all_stay_in_the_cache_are_computed_one_after_the_other(make_run: MakeRun) -> None:
    run = make_run(blocks=12, seqs=4, tokens=8, prefix_cache=False, prompt_tokens=8)
    jobs = [Job((number,) * (44 - 10 * number), output=3, arrives=number) for number in range(4)]
    run.run_all(jobs)  # each overtakes those before it, and none fits beside them
    assert run.outputs == expected(jobs)


def test_only_as_many_run_as_may(make_run: MakeRun) -> None:
    run = make_run(seqs=2)
    for name in "abc":
        run.add(name, Job((1, 2), output=2))
    assert [s.request_id for s in run.step().sequences] == ["a", "b"]
    assert [s.request_id for s in run.step().sequences] == ["a", "b"]
    assert [s.request_id for s in run.step().sequences] == ["c"]


def test_requests_wanted_all_together_begin_with_the_greatest_outputs(make_run: MakeRun) -> None:
    def finished(run: Run, *, longest_first: bool) -> tuple[list[str], int]:
        jobs = {"a": 2, "b": 2, "c": 3, "d": 2, "e": 9}
        for name, output in jobs.items():
            run.add(name, Job((1, 2), output=output))
        if longest_first:
            run.scheduler.begin_longest_first()
        while run.scheduler.has_work:
            run.step()
        assert {name: len(run.outputs[name, 0]) for name in jobs} == jobs
        return run.first_seen, len(run.log)

    assert finished(make_run(seqs=2), longest_first=False) == (["a", "b", "c", "d", "e"], 13)
    assert finished(make_run(seqs=2), longest_first=True) == (["e", "c", "a", "b", "d"], 9)


def test_who_has_no_greatest_output_begins_first(make_run: MakeRun) -> None:
    run = make_run(seqs=1)
    for name in "abc":
        run.add(name, Job((1, 2), output=4))
    run.scheduler.waiting[1].params = SamplingParams(max_tokens=None)
    run.scheduler.begin_longest_first()
    assert [s.request_id for s in run.scheduler.waiting] == ["b", "a", "c"]


def test_a_target_leaves_requests_in_the_order_of_their_prompts(make_run: MakeRun) -> None:
    run = make_run(seqs=2, prompt_tokens=4)
    for name, length, output in (("a", 3, 1), ("b", 1, 2), ("c", 2, 9)):
        run.add(name, Job((1,) * length, output=output))
    run.scheduler.begin_longest_first()
    while run.scheduler.has_work:
        run.step()
    assert run.first_seen == ["b", "c", "a"]


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


def test_who_waits_for_the_last_token_alone_leaves_room_for_others_at_once(make_run: MakeRun) -> None:
    run = make_run(seqs=1, blocks=2, prefix_cache=False, overlap=True)
    run.add("a", Job((1,) * 5, output=2))
    run.add("b", Job((2,) * 5, output=1))
    assert [s.request_id for s in run.step().sequences] == ["a"]
    assert [s.request_id for s in run.step().sequences] == ["a"]
    assert run.scheduler.blocks.num_used == 0
    assert run.outputs == {}  # its last token is not known yet, and needs nothing of what it held
    assert [s.request_id for s in run.step().sequences] == ["b"]
    assert list(run.outputs) == [("a", 0)]
    assert run.step().sequences == []
    assert list(run.outputs) == [("a", 0), ("b", 0)]
    assert not run.scheduler.has_work


def test_who_gives_way_with_a_token_pending_knows_it_when_it_comes_back(make_run: MakeRun) -> None:
    run = make_run(blocks=4, prefix_cache=False, overlap=True)
    run.add("a", Job((1,) * 7, output=5))
    run.add("b", Job((2,) * 7, output=5))
    run.step()
    run.step()
    pending = run.scheduler.running[1]
    assert pending.pending == 1
    assert run.step().preempted == [pending]
    assert pending.pending == 0
    while run.scheduler.has_work:
        run.step()
    assert {key: len(ids) for key, ids in run.outputs.items()} == {("a", 0): 5, ("b", 0): 5}


def test_a_surplus_step_of_who_has_ended_frees_its_blocks_before_its_token_is_known(make_run: MakeRun) -> None:
    run = make_run(prefix_cache=False, overlap=True)
    run.add("a", Job((1,) * 5, output=2, more=10))
    run.step()
    run.step()
    assert [s.request_id for s in run.step().sequences] == ["a"]  # its second token, an end, was not known yet
    assert list(run.outputs) == [("a", 0)]
    assert run.scheduler.blocks.num_used == 0
    assert run.step().sequences == []
    assert len(run.outputs["a", 0]) == 2
