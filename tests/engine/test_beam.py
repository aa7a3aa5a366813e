"""The policy of beam search, and the scheduling of its sequences, without a model."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.config import SchedulerConfig
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.beam import BeamSearch, Hypothesis, Move, candidate_count, go_on
from hasten.engine.block_manager import BlockManager
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence

if TYPE_CHECKING:
    from tests.engine.conftest import Follower, MakeSequence, Shadow

VOCAB = 24
Tokens = tuple[int, ...]
Pairs = list[tuple[int, float]]
"""Tokens that may come next, the most probable first, and their log-probabilities."""


def candidates(prefix: Tokens, count: int = VOCAB, vocab: int = VOCAB) -> Pairs:
    """A language model: what may follow a prefix, the most probable first."""
    rng = random.Random(hash(prefix))
    weights = [math.exp(rng.gauss(0, 1)) for _ in range(vocab)]
    pairs = [(token, math.log(weight / sum(weights))) for token, weight in enumerate(weights)]
    return sorted(pairs, key=lambda pair: -pair[1])[:count]


def take(search: BeamSearch, key: int, pairs: Pairs) -> list[Move]:
    """Give a beam's candidates to a search, which goes on by itself once it has those of all beams."""
    tokens, logprobs = zip(*pairs, strict=True)
    complete = search.take(key, (np.array(tokens), np.array(logprobs)))
    return go_on([search])[0] if complete else []


def run(params: SamplingParams, prompt: Tokens = (), eos: Tokens = (), vocab: int = VOCAB) -> list[Hypothesis]:
    """A search alone: its beams in a dictionary, moved about as it says."""
    keys = list(range(params.beam_width))
    assert params.max_tokens is not None
    search = BeamSearch(params, eos, params.max_tokens, keys)
    beams = dict.fromkeys(keys, prompt)
    count = min(vocab, candidate_count(params, eos))
    asked = keys[:1]
    wide = candidate_count(params, eos) > vocab
    while not search.done:
        moves: list[Move] = []
        for key in asked:
            assert moves == []
            moves = take(search, key, candidates(beams[key], count, vocab))
        if moves:
            assert wide or sorted(key for key, _, _ in moves) == keys
            parents = {parent for _, parent, _ in moves}
            assert all(parent == key for key, parent, _ in moves if key in parents)  # nobody's blocks are lost
        beams = {key: (*beams[parent], token) for key, parent, token in moves}
        asked = list(beams)
    return search.hypotheses


def test_the_policy_does_not_need_torch() -> None:
    program = "import sys, hasten.engine.beam; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0, 2.5])
@pytest.mark.parametrize("eos", [(), (0,), (0, 2)])
def test_a_search_that_is_wide_enough_finds_what_trying_all_finds(eos: Tokens, penalty: float) -> None:
    vocab, length = 4, 3
    params = SamplingParams(beam_width=vocab**length, max_tokens=length, length_penalty=penalty)
    scores: dict[Tokens, float] = {}
    for tokens in product(range(vocab), repeat=length):
        end = next((place for place, token in enumerate(tokens) if token in eos), length - 1) + 1
        total = sum(dict(candidates(tokens[:place], vocab, vocab))[tokens[place]] for place in range(end))
        scores[tokens[:end]] = total / end**penalty
    found = run(params, eos=eos, vocab=vocab)
    assert {hypothesis.token_ids: hypothesis.score for hypothesis in found} == pytest.approx(scores)
    # the last bits depend on how the logarithms were added, and `sum` adds otherwise since Python 3.12
    assert [hypothesis.score for hypothesis in found] == pytest.approx(sorted(scores.values(), reverse=True))
    assert all(one.score >= other.score for one, other in pairwise(found))
    assert all(hypothesis.ended == (hypothesis.token_ids[-1] in eos) for hypothesis in found)


def search_of_two(**options: object) -> BeamSearch:
    params = SamplingParams(beam_width=2, max_tokens=9, **options)  # type: ignore[arg-type]  # names of its fields
    return BeamSearch(params, (0,), 9, [7, 8])


def test_the_first_choice_is_among_one_beams_continuations() -> None:
    assert take(search_of_two(), 7, [(5, -1.0), (3, -2.0), (0, -3.0), (4, -4.0)]) == [(7, 7, 5), (8, 7, 3)]


def test_a_beam_without_continuations_takes_over_anothers() -> None:
    search = search_of_two()
    take(search, 7, [(5, -1.0), (3, -2.0), (1, -3.0), (4, -4.0)])
    assert take(search, 8, [(1, -0.1), (2, -0.3), (3, -5.0), (4, -6.0)]) == []
    assert take(search, 7, [(1, -4.0), (2, -4.1), (3, -5.0), (4, -6.0)]) == [(8, 8, 1), (7, 8, 2)]
    assert [(found.token_ids, found.ended) for found in search.unfinished()] == [((3, 1), False), ((3, 2), False)]
    assert [found.logprob for found in search.unfinished()] == pytest.approx([-2.1, -2.3])


def test_diversity_takes_from_a_beams_lesser_continuations_for_the_choice_alone() -> None:
    search = search_of_two(beam_search_diversity_rate=2.0)
    take(search, 7, [(5, -1.0), (3, -2.0), (1, -3.0), (4, -4.0)])
    take(search, 8, [(1, -0.1), (2, -0.3), (3, -5.0), (4, -6.0)])
    assert take(search, 7, [(1, -3.0), (2, -4.1), (3, -5.0), (4, -6.0)]) == [(8, 8, 1), (7, 7, 1)]
    assert [found.logprob for found in search.unfinished()] == pytest.approx([-2.1, -4.0])


@pytest.mark.parametrize("early", [False, True])
def test_early_stopping_ends_once_enough_beams_have_ended(early: bool) -> None:
    search = search_of_two(early_stopping=early, length_penalty=0.0)
    take(search, 7, [(5, -1.0), (0, -2.0), (1, -2.1), (4, -4.0)])
    assert [found.token_ids for found in search.hypotheses] == [(0,)]
    take(search, 7, [(5, -0.1), (0, -4.0), (2, -5.0), (3, -6.0)])
    moves = take(search, 8, [(0, -0.2), (3, -3.0), (2, -5.0), (4, -6.0)])
    assert [found.token_ids for found in search.hypotheses] == [(0,), (1, 0)]
    assert search.done == early
    assert moves == ([] if early else [(7, 7, 5), (8, 8, 3)])


def test_a_search_ends_when_no_beam_is_as_good_as_the_worst_that_ended() -> None:
    search = search_of_two(length_penalty=0.0)
    take(search, 7, [(0, -0.1), (5, -3.0), (1, -3.1), (4, -4.0)])
    take(search, 7, [(0, -0.1), (5, -4.0), (1, -4.1), (4, -4.2)])
    assert take(search, 8, [(5, -1.0), (3, -2.0), (1, -3.0), (4, -4.0)]) == []
    assert search.done
    assert [found.token_ids for found in search.hypotheses] == [(0,), (5, 0)]


def test_searches_of_all_shapes_go_on_together_as_they_do_alone() -> None:
    kinds: list[dict[str, float]] = [{}, {"beam_search_diversity_rate": 0.7}, {"length_penalty": 0.0}]
    params = [
        SamplingParams(beam_width=width, max_tokens=4 + width % 3, **kind)  # type: ignore[arg-type]
        for width in (2, 3, 3, 5)
        for kind in kinds
    ]
    prompts = [(number,) for number in range(len(params))]
    searches = [BeamSearch(each, (0,), each.max_tokens or 0, list(range(each.beam_width))) for each in params]
    beams: list[dict[int, Tokens]] = [{0: prompt} for prompt in prompts]
    while not all(search.done for search in searches):
        going = [number for number, search in enumerate(searches) if not search.done]
        for number in going:
            count = candidate_count(params[number], (0,))
            for key, tokens in beams[number].items():
                ids, logprobs = zip(*candidates(tokens, count), strict=True)
                complete = searches[number].take(key, (np.array(ids), np.array(logprobs)))
            assert complete
        for number, moves in zip(going, go_on([searches[number] for number in going]), strict=True):
            beams[number] = {key: (*beams[number][parent], token) for key, parent, token in moves}
    alone = [run(each, prompt, (0,)) for each, prompt in zip(params, prompts, strict=True)]
    assert [search.hypotheses for search in searches] == alone


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
        return run(self.params, self.prompt) if self.width > 1 else []


@dataclass
class Ranks:
    """Two ranks without a model, of which one follows, and a cache on paper."""

    scheduler: Scheduler
    follower: Follower
    cache: Shadow
    keys: dict[str, list[int]] = field(default_factory=dict)
    """Of the sequences of each unfinished request."""
    searches: dict[str, BeamSearch] = field(default_factory=dict)
    found: dict[str, list[Hypothesis]] = field(default_factory=dict)

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

    def step(self) -> None:
        batch = self.scheduler.schedule()
        self.follower.follow(batch)
        assert batch.num_tokens <= self.scheduler._max_tokens
        assert len(self.scheduler.running) <= self.scheduler.config.max_num_seqs
        self.check_together(batch)
        self.cache.run(batch)
        self.scheduler.advance(batch)
        self.cache.check(self.scheduler._sequences.values())
        for sequence in [batch.sequences[place] for place in batch.sampled]:
            self.take(sequence)

    def check_together(self, batch: Batch) -> None:
        """Beams run or wait all together; whoever waits after a preemption has given all blocks back."""
        running = self.scheduler.running
        for sequence in [*running, *batch.preempted]:
            assert {member in running for member in sequence.unit} == {sequence in running}
        for victim in batch.preempted:
            assert not any(member.block_table or member in batch.sequences for member in victim.unit)

    def take(self, sequence: Sequence) -> None:
        name = sequence.request_id
        if name not in self.keys:
            return
        if sequence.beams is None:
            sequence.append(sequence.length % VOCAB)
            if sequence.output_len == sequence.params.max_tokens:
                self.found[name] = []
                self.end(name)
            return
        search = self.searches[name]
        count = candidate_count(sequence.params, ())
        moves = take(search, sequence.key, candidates(tuple(sequence.token_ids), count))
        if moves:
            self.scheduler.move(moves)
        if search.done:
            self.found[name] = search.hypotheses
            self.end(name)

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
    def make(blocks: int, seqs: int, tokens: int, *, prefix_cache: bool) -> Ranks:
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
        manager = BlockManager(blocks, 4, enable_prefix_caching=prefix_cache)
        return Ranks(Scheduler(config, manager), make_follower(seqs), shadow(manager))

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
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_beams_end_as_if_alone_whatever_comes(
    make_ranks: MakeRanks, jobs: list[Job], blocks: int, seqs: int, more: int, prefix_cache: bool
) -> None:
    ranks = make_ranks(blocks, seqs, seqs + more, prefix_cache=prefix_cache)
    ranks.run_all(jobs)
    right = {str(number): job.alone() for number, job in enumerate(jobs)}
    assert {name: right[name] for name in ranks.found} == ranks.found
    assert {str(number) for number, job in enumerate(jobs) if job.leaves is None} <= set(ranks.found)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_preempted_search_needs_no_more_blocks_than_before(make_ranks: MakeRanks, prefix_cache: bool) -> None:
    """The bound by which requests are refused: the prompt's whole blocks once, all others for each beam."""
    jobs = [Job(tuple(range(22)), width=5, output=10, arrives=arrives) for arrives in (0, 1, 2)]
    ranks = make_ranks(5 + 5 * 3, 15, 64, prefix_cache=prefix_cache)
    ranks.run_all(jobs)
    assert ranks.scheduler.stats.preemptions > 0
    assert [ranks.found[str(number)] for number in range(3)] == [run(jobs[0].params, jobs[0].prompt)] * 3


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
            manager.share(parent, sequence, length)
        count = sequence.length - sequence.num_computed
        copies = manager.reserve(sequence, count)
        assert copies is not None
        assert len(copies) == (parent is not None and length % 4 > 0)
        cache.copy(copies)
        cache.write(sequence, count)
        sequence.num_computed += count
        manager.register(sequence)
        cache.check([leader, beam])
    assert beam.block_table[: length // 4] == leader.block_table[: length // 4]
    for sequence in (leader, beam):
        manager.free(sequence)
    assert manager.num_used == 0
