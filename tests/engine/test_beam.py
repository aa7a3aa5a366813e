"""The policy of beam search, and the scheduling of its sequences, without a model."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.waiting import LIMIT_S

from hasten import ops
from hasten.core.config import SchedulerConfig
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.beam import BeamSearch, BeamStep, Hypothesis, candidate_count, end_tokens
from hasten.engine.beam_choice import BeamRecords, beam_steps
from hasten.engine.block_manager import BlockManager
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from tests.engine.conftest import Follower, MakeSequence, Shadow

VOCAB = 24
CPU = torch.device("cpu")
Tokens = tuple[int, ...]
Pairs = list[tuple[int, float]]
"""Tokens that may come next, the most probable first, and their log-probabilities."""


def candidates(prefix: Tokens, count: int = VOCAB, vocab: int = VOCAB) -> Pairs:
    """A language model: what may follow a prefix, the most probable first. Tokens beyond the vocabulary never do."""
    rng = random.Random(hash(prefix))
    weights = [math.exp(rng.gauss(0, 1)) for _ in range(vocab)]
    pairs = [(token, math.log(weight / sum(weights))) for token, weight in enumerate(weights)]
    pairs = sorted(pairs, key=lambda pair: -pair[1])
    return [*pairs, *((token, -math.inf) for token in range(vocab, count))][:count]


def tensors(pairs: list[Pairs]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and tokens of each beam."""
    values = torch.tensor([[logprob for _, logprob in each] for each in pairs])
    return values, torch.tensor([[token for token, _ in each] for each in pairs], dtype=torch.int32)


class Searches:
    """Searches without sequences: the beams of each go on by themselves."""

    def __init__(self, params: list[SamplingParams], eos: Tokens = ()) -> None:
        self.all = [BeamSearch(each, eos, each.max_tokens or 0, list(range(each.beam_width))) for each in params]
        self.beams: list[list[Tokens]] = [[()] for _ in params]
        self._params, self._eos = params, eos
        widest = max(each.beam_width for each in params)
        self._states = ops.BeamStates.empty(len(params), widest, CPU)

    def step(self, pairs: list[list[Pairs]]) -> list[BeamStep | None]:
        """Go on with these candidates of the beams of each search, but of those that are done."""
        going = [number for number, search in enumerate(self.all) if not search.done]
        searches: dict[int, ops.Search] = {}
        rows = chosen = 0
        for number in going:
            params = self._params[number]
            ends = tuple(end_tokens(params, self._eos))
            keep, rate = candidate_count(params, self._eos), params.beam_search_diversity_rate
            width, count = params.beam_width, len(pairs[number])
            searches[number] = ops.Search(number, rows, count, width, keep, chosen, rate, ends)
            rows, chosen = rows + count, chosen + width
        values, ids = tensors([each for number in going for each in pairs[number]])
        sent, chosen_2b = ops.BeamSearches.of(list(searches.values()), CPU), torch.zeros(2, chosen, dtype=torch.int32)
        choice = ops.choose_beams(self._states, sent, values, ids, chosen_2b, 1000)
        steps = beam_steps(searches, [each.numpy() for each in choice])
        for number, step in steps.items():
            parents, tokens, _ = step.beams
            assert all(parents[parent] == parent for parent in parents)  # nobody's blocks are lost
            self.all[number].go_on(step)
            beams = self.beams[number]
            self.beams[number] = [(*beams[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        return [steps.get(number) for number in range(len(self.all))]


def run(
    params: list[SamplingParams], prompts: list[Tokens], eos: Tokens = (), vocab: int = VOCAB
) -> list[list[Hypothesis]]:
    """What searches that go on together find."""
    searches = Searches(params, eos)
    most = max(candidate_count(each, eos) for each in params)
    while not all(search.done for search in searches.all):
        searches.step(
            [
                [candidates((*prompt, *tokens), most, vocab) for tokens in beams]
                for prompt, beams in zip(prompts, searches.beams, strict=True)
            ]
        )
    return [search.hypotheses for search in searches.all]


def test_the_policy_does_not_need_torch() -> None:
    program = "import sys, hasten.engine.beam; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LIMIT_S)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0, 2.5])
@pytest.mark.parametrize("eos", [(), (0,), (0, 2)])
def test_a_search_that_is_wide_enough_finds_what_trying_all_finds(eos: Tokens, penalty: float) -> None:
    vocab, length = 4, 3
    params = SamplingParams(beam_width=vocab**length, max_tokens=length, length_penalty=penalty)
    scores: dict[Tokens, float] = {}
    for tokens in product(range(vocab), repeat=length):
        end = next((index for index, token in enumerate(tokens) if token in eos), length - 1) + 1
        total = sum(dict(candidates(tokens[:index], vocab, vocab))[tokens[index]] for index in range(end))
        scores[tokens[:end]] = total / end**penalty
    found = [each for each in run([params], [()], eos, vocab)[0] if math.isfinite(each.score)]
    assert {hypothesis.token_ids: hypothesis.score for hypothesis in found} == pytest.approx(scores, abs=1e-5)
    assert [hypothesis.score for hypothesis in found] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
    assert all(item.score >= other.score for item, other in pairwise(found))
    assert all(hypothesis.ended == (hypothesis.token_ids[-1] in eos) for hypothesis in found)


class Two:
    """A search with two beams, which is over where token 0 comes."""

    def __init__(self, **options: object) -> None:
        params = SamplingParams(beam_width=2, max_tokens=9, **options)  # type: ignore[arg-type]  # names of its fields
        self._searches = Searches([params], (0,))
        self.search = self._searches.all[0]

    def take(self, *pairs: Pairs) -> tuple[list[int], list[int]]:
        """The beams that the beams continue, and their tokens."""
        step = self._searches.step([list(pairs)])[0]
        assert step is not None
        return step.beams.beams, step.beams.tokens


def test_the_first_choice_is_among_one_beams_continuations() -> None:
    assert Two().take([(5, -1.0), (3, -2.0), (0, -3.0), (4, -4.0)]) == ([0, 0], [5, 3])


def test_a_beam_without_continuations_takes_over_anothers() -> None:
    two = Two()
    two.take([(5, -1.0), (3, -2.0), (1, -3.0), (4, -4.0)])
    first = [(1, -4.0), (2, -4.1), (3, -5.0), (4, -6.0)]
    assert two.take(first, [(1, -0.1), (2, -0.3), (3, -5.0), (4, -6.0)]) == ([1, 1], [2, 1])
    found = two.search.unfinished()
    assert [(each.token_ids, each.ended) for each in found] == [((3, 1), False), ((3, 2), False)]
    assert [each.logprob for each in found] == pytest.approx([-2.1, -2.3])


def test_diversity_takes_from_a_beams_lesser_continuations_for_the_choice_alone() -> None:
    two = Two(beam_search_diversity_rate=2.0)
    two.take([(5, -1.0), (3, -2.0), (1, -3.0), (4, -4.0)])
    second = [(1, -0.1), (2, -0.3), (3, -5.0), (4, -6.0)]
    assert two.take([(1, -3.0), (2, -4.1), (3, -5.0), (4, -6.0)], second) == ([0, 1], [1, 1])
    assert [found.logprob for found in two.search.unfinished()] == pytest.approx([-2.1, -4.0])


@pytest.mark.parametrize("early", [False, True])
def test_early_stopping_ends_once_enough_beams_have_ended(early: bool) -> None:
    two = Two(early_stopping=early, length_penalty=0.0)
    assert two.take([(5, -1.0), (0, -2.0), (1, -2.1), (4, -4.0)]) == ([0, 0], [5, 1])
    assert [found.token_ids for found in two.search.hypotheses] == [(0,)]
    second = [(0, -0.2), (3, -3.0), (2, -5.0), (4, -6.0)]
    assert two.take([(5, -0.1), (0, -4.0), (2, -5.0), (3, -6.0)], second) == ([0, 1], [5, 3])
    assert [found.token_ids for found in two.search.hypotheses] == [(0,), (1, 0)]
    assert two.search.done == early


def test_a_search_ends_when_no_beam_is_as_good_as_the_worst_that_ended() -> None:
    two = Two(length_penalty=0.0)
    two.take([(0, -0.1), (5, -3.0), (1, -3.1), (4, -4.0)])
    two.take([(0, -0.1), (5, -4.0), (1, -4.1), (4, -4.2)], [(5, -1.0), (3, -2.0), (1, -3.0), (4, -4.0)])
    assert two.search.done
    assert [found.token_ids for found in two.search.hypotheses] == [(0,), (5, 0)]


def test_searches_of_all_shapes_go_on_together_as_they_do_alone() -> None:
    kinds: list[dict[str, float]] = [{}, {"beam_search_diversity_rate": 0.7}, {"length_penalty": 0.0}]
    params = [
        SamplingParams(beam_width=width, max_tokens=4 + width % 3, **kind)  # type: ignore[arg-type]
        for width in (2, 3, 3, 5)
        for kind in kinds
    ]
    prompts: list[Tokens] = [(number,) for number in range(len(params))]
    alone = [run([each], [prompt], (0,))[0] for each, prompt in zip(params, prompts, strict=True)]
    assert run(params, prompts, (0,)) == alone


# --- scheduling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A request of some beams or of one plain sequence, the step before which it comes, and when it is withdrawn."""

    prompt: Tokens
    width: int
    output: int
    arrives: int
    leaves: int | None = None

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(beam_width=self.width, max_tokens=self.output, stop_token_ids=[0, 1], ignore_eos=True)

    def alone(self) -> list[Hypothesis]:
        """What it finds, worked out without a scheduler."""
        return run([self.params], [self.prompt])[0] if self.width > 1 else []


class Device:
    """A device without a model: a cache on paper, and what was chosen in the last step."""

    def __init__(self, seqs: int, cache: Shadow) -> None:
        self.cache = cache
        self._records = BeamRecords((), CPU)
        self._kept = torch.zeros(2, seqs, dtype=torch.int32)

    def release(self, key: int) -> None:
        self._records.release(key)

    def run(self, message: StepMessage, array: torch.Tensor) -> list[Tokens]:
        """Compute a step by its message alone: what the last token of each sampled sequence sees."""
        size, slots = self.cache.manager.block_size, self.cache.slots
        for copies in message.copy_rounds():
            self.cache.copy(copies)
        tables = array[message.rows].tolist()
        self._move(message, tables)
        ids = iter(message.ids)
        seen = []
        for table, start, count in zip(tables, message.starts, message.counts, strict=True):
            prefix: Tokens = slots[table[(start - 1) // size]][(start - 1) % size] if start else ()
            assert len(prefix) == start
            for position in range(start, start + count):
                token = next(ids)
                prefix = (*prefix, token if token >= 0 else int(self._kept[0, -1 - token]))
                block = table[position // size]
                assert self.cache.manager._references[block] == 1
                slots[block][position % size] = prefix
            seen.append(prefix)
        return [seen[index] for index in message.sampled]

    def _move(self, message: StepMessage, tables: list[list[int]]) -> None:
        size, slots = self.cache.manager.block_size, self.cache.slots
        for index, first, parent in message.moves:
            source = first + (parent if parent >= 0 else int(self._kept[1, -1 - parent]))
            whole, tail = divmod(message.starts[index], size)
            tables[index][:whole] = tables[source][:whole]
            if tail:
                slots[tables[index][whole]][:tail] = slots[tables[source][whole]][:tail]

    def choose(self, sequences: list[Sequence], seen: list[Tokens]) -> Chosen:
        """Choose what comes next, before the step is noted as done."""
        tokens = torch.tensor([len(prefix) % VOCAB for prefix in seen], dtype=torch.int32)
        pairs = [candidates(prefix) for prefix, each in zip(seen, sequences, strict=True) if each.beams is not None]
        steps: dict[int, BeamStep] = {}
        kept = tokens.unsqueeze(0)
        if pairs:
            successors = [successor for each in sequences for successor in each.successors]
            layout = self._records.layout(sequences, successors, CPU)
            choice = layout.choose(self._records.states, *tensors(pairs), tokens, VOCAB)
            steps, kept = beam_steps(layout.by_row, [each.numpy() for each in choice]), choice.chosen_2b
        self._kept[: len(kept), : kept.shape[1]] = kept
        return Chosen(sequences, tokens.tolist(), steps)


@dataclass(frozen=True)
class Chosen:
    """What a step chose."""

    sequences: list[Sequence]
    tokens: list[int]
    steps: dict[int, BeamStep]


@dataclass
class Ranks:
    """Two ranks without a model, of which one follows; a step's choice is known after `lag` further ones."""

    scheduler: Scheduler
    follower: Follower
    device: Device
    lag: int
    keys: dict[str, list[int]] = field(default_factory=dict)
    """Of the sequences of each unfinished request."""
    searches: dict[str, BeamSearch] = field(default_factory=dict)
    found: dict[str, list[Hypothesis]] = field(default_factory=dict)
    flights: deque[Chosen] = field(default_factory=deque)

    def add(self, name: str, job: Job) -> None:
        leader = Sequence(Request(request_id=name, prompt_token_ids=job.prompt, params=job.params), seed=0)
        self.scheduler.add(leader)
        self.keys[name] = [member.key for member in leader.unit]
        if job.width > 1:
            self.searches[name] = BeamSearch(job.params, (), job.output, self.keys[name])

    def end(self, name: str) -> None:
        for key in self.keys.pop(name):
            self.scheduler.finish(key)
            self.follower.rows.release(key)
            self.device.release(key)

    def step(self) -> None:
        batch = self.scheduler.schedule()
        assert batch.num_tokens <= self.scheduler._max_tokens
        assert len(self.scheduler.running) <= self.scheduler.config.max_num_seqs
        self.check_together(batch)
        if batch.sequences:
            message = self.follower.follow(batch)
            seen = self.device.run(message, torch.from_numpy(self.follower.tables.array))
            sequences = [batch.sequences[index] for index in batch.sampled]
            self.flights.append(self.device.choose(sequences, seen))
            self.scheduler.advance(batch)
            self.device.cache.check_books(list(self.scheduler._sequences.values()))
        elif self.flights:
            self.take(self.flights.popleft())
        while len(self.flights) > self.lag:
            self.take(self.flights.popleft())

    def check_together(self, batch: Batch) -> None:
        """Beams run or wait all together, and choose together; whoever was preempted has given all blocks back."""
        running = self.scheduler.running
        for sequence in [*running, *batch.preempted]:
            assert {member in running for member in sequence.unit} == {sequence in running}
        for victim in batch.preempted:
            assert not any(member.block_table or member in batch.sequences for member in victim.unit)
        sampled = [batch.sequences[index] for index in batch.sampled]
        for sequence in sampled:
            if sequence.beams is not None and len(sequence.successors) == 1:
                assert all(member in sampled for member in sequence.unit)

    def take(self, chosen: Chosen) -> None:
        """Hear of what a step chose, of requests that are there still."""
        for row, (sequence, token) in enumerate(zip(chosen.sequences, chosen.tokens, strict=True)):
            name = sequence.request_id
            if name not in self.keys:
                continue
            if sequence.beams is None:
                sequence.append(token)
                if len(sequence.token_ids) == sequence.max_length:
                    self.found[name] = []
                    self.end(name)
            elif row in chosen.steps:
                self.go_on(name, chosen.steps[row])

    def go_on(self, name: str, step: BeamStep) -> None:
        search = self.searches[name]
        search.go_on(step)
        if search.done:
            self.found[name] = search.hypotheses
            self.end(name)
        else:
            self.scheduler.move(search.keys[0], step.beams.beams, step.beams.tokens)

    def run_all(self, jobs: list[Job]) -> None:
        steps = 0
        while steps <= max(job.arrives for job in jobs) or self.keys:
            for number, job in enumerate(jobs):
                if job.leaves == steps and str(number) in self.keys:
                    self.end(str(number))
                if job.arrives == steps:
                    self.add(str(number), job)
            self.step()
            steps += 1
            assert steps < 3000
        self.step()
        assert self.scheduler.blocks.num_used == 0
        assert not self.scheduler.has_work


MakeRanks = Callable[..., Ranks]


@pytest.fixture(scope="session")
def make_ranks(shadow: type[Shadow], make_follower: type[Follower]) -> MakeRanks:
    def make(blocks: int, seqs: int, tokens: int, *, prefix_cache: bool, lag: int = 0) -> Ranks:
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
        manager = BlockManager(blocks, 4, enable_prefix_caching=prefix_cache)
        return Ranks(Scheduler(config, manager), make_follower(seqs), Device(seqs, shadow(manager)), lag)

    return make


JOBS = st.lists(
    st.builds(
        Job,
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=18).map(tuple),
        width=st.sampled_from([1, 2, 3, 4, 5]),
        output=st.integers(1, 9),
        arrives=st.integers(0, 12),
        leaves=st.sampled_from([None, None, None, 3, 9, 14]),
    ),
    min_size=1,
    max_size=6,
)


@given(
    jobs=JOBS,
    blocks=st.integers(24, 50),  # 18 + 9 tokens are 4 blocks once and 3 for each of 5 beams
    seqs=st.integers(5, 12),
    more=st.integers(0, 30),
    prefix_cache=st.booleans(),
    lag=st.integers(0, 1),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_beams_end_as_if_alone_whatever_comes(
    make_ranks: MakeRanks, jobs: list[Job], blocks: int, seqs: int, more: int, prefix_cache: bool, lag: int
) -> None:
    ranks = make_ranks(blocks, seqs, seqs + more, prefix_cache=prefix_cache, lag=lag)
    ranks.run_all(jobs)
    right = {str(number): job.alone() for number, job in enumerate(jobs)}
    assert {name: right[name] for name in ranks.found} == ranks.found
    assert {str(number) for number, job in enumerate(jobs) if job.leaves is None} <= set(ranks.found)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_preempted_search_needs_no_more_blocks_than_before(
    make_ranks: MakeRanks, prefix_cache: bool, lag: int
) -> None:
    """The bound by which requests are refused: the prompt's whole blocks once, all others for each beam."""
    jobs = [Job(tuple(range(22)), width=5, output=10, arrives=arrives) for arrives in (0, 1, 2)]
    ranks = make_ranks(5 + 5 * 3, 15, 64, prefix_cache=prefix_cache, lag=lag)
    ranks.run_all(jobs)
    assert ranks.scheduler.stats.preemptions > 0
    assert [ranks.found[str(number)] for number in range(3)] == [jobs[0].alone()] * 3


def test_all_beams_choose_after_a_preemption_even_where_they_are_equal() -> None:
    """As after a token that is forced: nobody's last token is computed for all."""
    params = SamplingParams(beam_width=3, max_tokens=5)
    leader = Sequence(Request(request_id="r", prompt_token_ids=(7, 8), params=params), seed=0)
    assert leader.beams is not None
    assert (leader.beams.trunk, len(leader.successors)) == (2, 3)
    for beam in leader.beams.members:
        beam.append(9)
    leader.beams.scatter()
    assert (leader.beams.trunk, leader.uncomputed, len(leader.successors)) == (2, 2, 1)


@pytest.mark.parametrize("length", [4, 6, 8, 12])
def test_a_share_of_anothers_blocks_is_known_by_what_it_holds(
    length: int, shadow: type[Shadow], make_sequence: MakeSequence
) -> None:
    """The leader of a preempted search may be further than what all have in common."""
    manager = BlockManager(16, 4)
    cache = shadow(manager)
    leader = make_sequence(range(13))
    beam = make_sequence([*range(length), *range(20, 41 - length)])
    for sequence, parent in ((leader, None), (beam, leader)):
        if parent is not None:
            manager.share(parent, sequence, length // 4)
            sequence.num_computed = length // 4 * 4
        count = sequence.length - sequence.num_computed
        assert manager.reserve(sequence, count) == []
        cache.write(sequence, count)
        sequence.num_computed += count
        manager.register(sequence)
        cache.check([leader, beam])
    assert beam.block_table[: length // 4] == leader.block_table[: length // 4]
    for sequence in (leader, beam):
        manager.free(sequence)
    assert manager.num_used == 0
