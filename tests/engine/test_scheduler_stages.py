"""The scheduler of a pipeline, with several steps under way: every token is the right one, and steps are balanced."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_scheduler import JOBS, SIZE, Job, expected

from hasten.core.config import SchedulerConfig
from hasten.core.errors import CapacityError
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.rank_options import LEAST_STEP_TOKENS, resolve_scheduler
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.parallel.groups import PipelineGroup

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from tests.engine.conftest import Shadow


class Pipeline:
    """An engine without a model, whose tokens are known as late as a pipeline lets them be.

    `overlap`: the devices have tokens that the scheduler does not know. Without it, `defers` says whether the last
    stage computes a step at once or, as on a CPU, when its tokens are collected.
    """

    def __init__(
        self, shadow: type[Shadow], stages: int, mode: str, blocks: int, seqs: int, tokens: int, least: int
    ) -> None:
        self.stages, self.overlap, self.defers = stages, mode == "overlapped", mode == "deferred"
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, overlap_steps=self.overlap)
        manager = BlockManager(blocks, SIZE)
        self.scheduler, self.cache = Scheduler(config, manager, stages, least), shadow(manager)
        self.rows = TableRows(seqs)
        self.seqs = seqs
        self.kept = [-1] * (stages * seqs)
        """The chosen tokens as devices keep them."""
        self.truth: dict[int, list[int]] = {}
        """Key -> tokens of the prompt and all that were chosen."""
        self.flights: deque[tuple[Batch, list[Sequence]]] = deque()
        self.wanted: dict[str, int] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.batches: list[Batch] = []

    def add(self, name: str, job: Job) -> None:
        params = SamplingParams(n=job.n, max_tokens=job.output + job.more)
        sequence = Sequence(Request(request_id=name, prompt_token_ids=job.prompt, params=params), seed=0)
        self.wanted[name] = job.output
        self.scheduler.add(sequence)
        self.truth[sequence.key] = list(sequence.token_ids)

    def step(self) -> None:
        batch = self.scheduler.schedule()
        if batch.sequences:
            self.launch(batch)
        else:
            self.collect()
        while len(self.flights) > (self.stages if self.overlap else self.stages - 1):
            self.collect()
        self.check()

    def launch(self, batch: Batch) -> None:
        self.batches.append(batch)
        message = StepMessage.of(batch, self.rows)
        ids = [self.kept[-1 - token] if token < 0 else token for token in message.ids]
        work = zip(batch.sequences, message.starts, batch.counts, strict=True)
        assert ids == [token for s, first, count in work for token in self.truth[s.key][first : first + count]]
        self.with_pending(lambda: self.cache.run(batch))
        for child in self.scheduler.advance(batch, chosen=not self.defers):
            self.truth[child.key] = list(child.token_ids)
        sampled = [batch.sequences[index] for index in batch.sampled]
        for row, sequence in enumerate(sampled):
            token = hash((sequence.index, *self.truth[sequence.key])) % 3
            self.truth[sequence.key].append(token)
            self.kept[batch.number % self.stages * self.seqs + row] = token
        self.flights.append((batch, sampled))
        while self.flights[0][0] is not batch and any(sequence.pending > 1 for sequence in sampled):
            self.collect()

    def with_pending(self, act: Callable[[], object]) -> None:
        """Act on sequences with the tokens that devices have of them."""
        sequences = list(self.scheduler._sequences.values())
        known = [len(sequence.token_ids) for sequence in sequences]
        for sequence, count in zip(sequences, known, strict=True):
            sequence.token_ids += self.truth[sequence.key][count : count + sequence.pending]
        act()
        for sequence, count in zip(sequences, known, strict=True):
            del sequence.token_ids[count:]

    def collect(self) -> None:
        batch, sampled = self.flights.popleft()
        if self.defers:
            self.scheduler.note_chosen(batch)
        self.scheduler.land(sampled)
        for sequence in sampled:
            if self.scheduler.get(sequence.key) is None:
                continue
            sequence.append(self.truth[sequence.key][len(sequence.token_ids)])
            output = sequence.token_ids[sequence.prompt_len :]
            if len(output) == self.wanted[sequence.request_id]:
                self.outputs[sequence.request_id, sequence.index] = output
                self.scheduler.finish(sequence.key)
                self.rows.release(sequence.key)

    def check(self) -> None:
        known = [s for s in self.scheduler._sequences.values() if not s.is_complete]
        assert all(sequence.pending <= 1 - self.defers for sequence in known)
        self.with_pending(lambda: self.cache.check(known))

    def run_all(self, jobs: list[Job]) -> None:
        steps = 0
        while steps <= max(job.arrives for job in jobs) or self.scheduler.has_work:
            for number, job in enumerate(jobs):
                if job.arrives == steps:
                    self.add(str(number), job)
            if self.scheduler.has_work:
                self.step()
            steps += 1
            assert steps < 3000
        while self.flights:
            self.collect()
        assert self.scheduler.blocks.num_used == 0
        assert all(sequence.in_flight == 0 for batch in self.batches for sequence in batch.sequences)


MakePipeline = Callable[..., Pipeline]
MODES = ["overlapped", "at once", "deferred"]


@pytest.fixture(scope="session")
def make_pipeline(shadow: type[Shadow]) -> MakePipeline:
    def make(
        stages: int = 2,
        mode: str = "overlapped",
        blocks: int = 64,
        seqs: int = 8,
        tokens: int = 16,
        least: int | None = None,
    ) -> Pipeline:
        """Prompts are cut for the stages only into steps of `least` tokens or more."""
        return Pipeline(shadow, stages, mode, blocks, seqs, tokens, tokens if least is None else least)

    return make


LIMITS = st.fixed_dictionaries(
    {
        "stages": st.integers(1, 4),
        "mode": st.sampled_from(MODES),
        "blocks": st.integers(8, 30),
        "seqs": st.integers(1, 6),
        "tokens": st.integers(6, 40),
        "least": st.integers(1, 40),
    }
)


@given(jobs=JOBS, limits=LIMITS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_whatever_comes_everything_ends_as_if_alone(
    make_pipeline: MakePipeline, jobs: list[Job], limits: dict[str, Any]
) -> None:
    pipeline = make_pipeline(**limits)
    pipeline.run_all(jobs)
    assert pipeline.outputs == expected(jobs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_running_sequences_are_dealt_to_as_many_steps_as_there_are_stages(
    make_pipeline: MakePipeline, stages: int, mode: str
) -> None:
    pipeline = make_pipeline(stages, mode, blocks=400, seqs=48, tokens=256)
    # they come all at once, as prompts of one step
    pipeline.run_all([Job((0, number % 2), output=30) for number in range(24)])
    decodes = pipeline.batches[2 * stages : -2 * stages]
    assert {len(batch.sequences) for batch in decodes} == {24 // stages}
    for first, batch in enumerate(decodes[:-stages]):
        keys = {sequence.key for sequence in batch.sequences}
        for other in decodes[first + 1 : first + stages]:
            assert keys.isdisjoint(sequence.key for sequence in other.sequences)
        assert keys == {sequence.key for sequence in decodes[first + stages].sequences}


def test_one_sequence_alone_is_in_every_step(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(3)
    pipeline.run_all([Job((0, 1), output=9)])
    assert [len(batch.sequences) for batch in pipeline.batches] == [1] * 9


def test_chunks_of_a_prompt_follow_each_other_without_waiting(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(4, "deferred", tokens=8)
    pipeline.add("0", Job((0,) * 30))
    for _ in range(4):
        pipeline.scheduler.advance(batch := pipeline.scheduler.schedule(), chosen=False)
        assert batch.sequences
    assert batch.counts == [6]
    assert not pipeline.scheduler.schedule().sequences  # nothing more before its token is known


def test_prompts_come_before_tokens_that_a_stage_would_wait_for(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(2)
    pipeline.add("0", Job((0, 1), output=20))
    pipeline.step()
    pipeline.add("1", Job((1, 1), output=20))
    pipeline.step()
    pipeline.step()
    first, second, third = ([s.request_id for s in batch.sequences] for batch in pipeline.batches)
    assert (first, second, third) == (["0"], ["1"], ["0"])


def test_a_cache_that_holds_no_sequence_is_an_error_here_too(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(2, blocks=2, tokens=64)
    pipeline.add("0", Job((0,) * 30))
    with pytest.raises(CapacityError, match="cannot hold one sequence"):
        pipeline.step()


def test_the_prompts_that_wait_are_divided_into_steps_for_all_stages(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(2, "deferred", blocks=400, seqs=16, tokens=200, least=4)
    for number in range(8):
        pipeline.add(str(number), Job((number,) * 20))
    counts = []
    while (batch := pipeline.scheduler.schedule()).sequences:
        pipeline.scheduler.advance(batch, chosen=False)
        counts.append(batch.num_tokens)
    assert sum(counts) == 160
    assert counts[0] == 160 // 16
    assert counts == sorted(counts, reverse=True)
    assert counts[-2] == 4


def test_no_more_prompts_are_computed_at_once_than_a_step_may_have(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(2, blocks=400, seqs=16, tokens=16, least=4)
    for number in range(16):
        pipeline.add(str(number), Job((0,) * 100))
    pipeline.step()
    assert pipeline.batches[0].num_tokens == 16


LAYERS = 30
Device = Literal["cuda", "cpu"]
SECONDS_PER_TOKEN, LEAST_SECONDS, SECONDS_PER_ROW, HEAD_SECONDS, BORDER_SECONDS = 21.5e-6, 3.3e-3, 7.7e-6, 0.6e-3, 30e-6
"""Of a step of BLOOM-7B1 on an H200: many tokens and few, the head, and what goes from one stage to the next."""
CPU_STEPS = ([1, 4, 8, 16, 32, 64, 128, 348, 1392], [41, 45, 66, 118, 205, 396, 748, 1973, 8623])
"""Tokens, and milliseconds of a step of a BLOOM of 24 layers, 1,024 wide, on one thread of a CPU."""
CPU_HEAD_SECONDS = 10e-3


def whole_seconds(batch: Batch, device: Device) -> float:
    """What all layers take for a step."""
    tokens = batch.num_tokens
    if device == "cpu":
        return float(np.interp(tokens, *CPU_STEPS)) / 1000
    return max(LEAST_SECONDS + SECONDS_PER_ROW * tokens, SECONDS_PER_TOKEN * tokens)


class Simulation:
    """The scheduler over as many requests as LAMBADA has, or fewer, and stages that take their time."""

    def __init__(self, device: Device, stages: int, prompts: int) -> None:
        rng = random.Random(1)
        config = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=None if device == "cpu" else 8192)
        config = resolve_scheduler(config, torch.device(device), stages)
        blocks = BlockManager(60_000, 16, enable_prefix_caching=False)
        self.scheduler = Scheduler(config, blocks, stages, LEAST_STEP_TOKENS[device])
        for number in range(prompts):
            length = max(10, round(rng.gauss(87, 30)))
            params = SamplingParams(max_tokens=4)
            request = Request(request_id=str(number), prompt_token_ids=tuple(range(length)), params=params)
            self.scheduler.add(Sequence(request, 0))
        self.device, self.stages = device, stages
        self.parts = [len(PipelineGroup(stage, stages).layers(LAYERS)) / LAYERS for stage in range(stages)]
        self.free = [0.0] * stages
        """When each stage has done what it was given."""
        self.busy = 0.0

    def compute(self, stage: int, at: float, batch: Batch) -> float:
        """When a stage has done a step that it can begin with at a time."""
        head = (HEAD_SECONDS if self.device == "cuda" else CPU_HEAD_SECONDS) * (stage == self.stages - 1)
        seconds = self.parts[stage] * whole_seconds(batch, self.device) + head
        self.busy += seconds
        self.free[stage] = max(at, self.free[stage]) + seconds
        return self.free[stage]

    def take(self, landed: list[Sequence]) -> None:
        self.scheduler.land(landed)
        for sequence in landed:
            if self.scheduler.get(sequence.key) is not None:
                sequence.append(1)
                if len(sequence.token_ids) == sequence.max_length:
                    self.scheduler.finish(sequence.key)

    def run_overlapped(self) -> None:
        """The host is ahead of the stages, which have the tokens that it does not know yet."""
        chosen_at, flights = {-1: 0.0}, deque[list[Sequence]]()
        while self.scheduler.has_work:
            batch = self.scheduler.schedule()
            if batch.sequences:
                at = max((chosen_at[s.last_step] for s in batch.sequences if s.pending), default=0.0)
                for stage in range(self.stages):
                    at = self.compute(stage, at, batch) + BORDER_SECONDS
                chosen_at[batch.number] = at
                self.scheduler.advance(batch)
                flights.append([batch.sequences[index] for index in batch.sampled])
            while len(flights) > self.stages * bool(batch.sequences):
                self.take(flights.popleft())

    def run_deferred(self) -> None:
        """Rank 0 schedules a step for the other stages, and then computes the last stage of the oldest one."""
        last, flights = self.stages - 1, deque[tuple[Batch, float]]()
        while self.scheduler.has_work:
            batch = self.scheduler.schedule()
            if batch.sequences:
                at = self.free[last]
                for stage in range(last):
                    at = self.compute(stage, at, batch)
                self.scheduler.advance(batch, chosen=False)
                flights.append((batch, at))
            while len(flights) > last * bool(batch.sequences):
                batch_done, at = flights.popleft()
                self.compute(last, at, batch_done)
                self.scheduler.note_chosen(batch_done)
                self.take([batch_done.sequences[index] for index in batch_done.sampled])

    @property
    def idle(self) -> float:
        """Share of the time that stages stood idle."""
        return 1 - self.busy / (self.stages * max(self.free))


@pytest.mark.parametrize(
    ("stages", "prompts", "most"), [(2, 5153, 0.08), (4, 5153, 0.12), (8, 5153, 0.20), (2, 512, 0.08), (4, 512, 0.13)]
)
def test_stages_seldom_stand_idle(stages: int, prompts: int, most: float) -> None:
    simulation = Simulation("cuda", stages, prompts)
    simulation.run_overlapped()
    assert simulation.idle < most


@pytest.mark.parametrize(
    ("stages", "prompts", "most"), [(2, 16, 0.11), (4, 16, 0.27), (2, 64, 0.08), (4, 64, 0.13), (2, 512, 0.03)]
)
def test_stages_of_a_few_prompts_on_cpus_seldom_stand_idle(stages: int, prompts: int, most: float) -> None:
    simulation = Simulation("cpu", stages, prompts)
    simulation.run_deferred()
    assert simulation.idle < most
