"""Beam search: which continuations live on, and when it ends. Never imports torch.

A request has `beam_width` sequences, its beams. Once the most probable tokens that may follow each beam are known, the
best continuations of all beams together are chosen, for all searches of a step at once. Those that end become
hypotheses; the others take the beams' places, and `Move` says whose continuation each beam is from then on.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hasten.core.types import SamplingParams

Candidates = tuple[NDArray[np.integer], NDArray[np.floating]]
"""Tokens that may come next, the most probable first, and their log-probabilities."""
Move = tuple[int, int, int]
"""A beam's key, the key of the beam that it continues, and the token that comes next."""


def end_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """Tokens that end a completion."""
    return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)


def candidate_count(params: SamplingParams, eos_token_ids: Sequence[int]) -> int:
    """How many continuations to look at: enough that `beam_width` of them go on, whatever ends."""
    return max(2, 1 + len(end_tokens(params, eos_token_ids))) * params.beam_width


class Beam(NamedTuple):
    """A completion under way."""

    key: int
    """Of its sequence."""
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    """Sum over its tokens."""


_Continuation = tuple[int, int, float]
"""The number of the beam that is continued, the token, and the sum of log-probabilities with it."""


@dataclass(frozen=True)
class Hypothesis:
    """A completion that is one of the best so far."""

    token_ids: tuple[int, ...]
    logprob: float
    """Sum over its tokens."""
    score: float
    """What completions are compared by."""
    ended: bool
    """Whether its last token ended it, and not the greatest length."""


class BeamSearch:
    """The beams of one request."""

    def __init__(self, params: SamplingParams, eos_token_ids: Sequence[int], max_tokens: int, keys: list[int]) -> None:
        self.keys = keys
        """Of all its sequences."""
        self.done = False
        self.hypotheses: list[Hypothesis] = []
        """Best first, never more than there are beams."""
        self._params = params
        self._max_tokens = max_tokens
        self._end_tokens = end_tokens(params, eos_token_ids)
        self._keep = candidate_count(params, eos_token_ids)
        self._beams = [Beam(keys[0])]  # at first all are the same, and only the first one has candidates
        self._candidates: dict[int, Candidates] = {}

    def take(self, key: int, candidates: Candidates) -> bool:
        """Note a beam's candidates; whether those of all beams are there, so that `go_on` can follow."""
        self._candidates[key] = candidates  # those of a preempted beam may come once more
        return len(self._candidates) == len(self._beams)

    def unfinished(self) -> list[Hypothesis]:
        """The beams as they are, best first, for a search that cannot be completed."""
        if not self._beams[0].token_ids:
            return []
        return sorted(map(self._hypothesis, self._beams), key=_score, reverse=True)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Beams that have candidates, candidates of each, and how many continuations are looked at."""
        ids_k, _ = self._candidates[self._beams[0].key]
        return len(self._beams), len(ids_k), self._keep

    def _go_on(self, best: list[_Continuation]) -> list[Move]:
        """Go on with the best continuations, best first; no moves once it is `done`."""
        self._candidates = {}
        width, length = len(self.keys), len(self._beams[0].token_ids) + 1
        at_end = length >= self._max_tokens
        # What comes after as many as there are beams is there only to go on where those end.
        going = best[:width]
        ended = [each for each in going if at_end or each[1] in self._end_tokens]
        if ended:
            self._conclude(ended)
            going = [] if at_end else [each for each in best if each[1] not in self._end_tokens][:width]
        self.done = not going or not self._may_improve(going, length)
        return [] if self.done else self._move(going)

    def _conclude(self, ended: list[_Continuation]) -> None:
        """Keep what has ended, if it is among the best."""
        new = (
            self._hypothesis(Beam(-1, (*self._beams[number].token_ids, token), logprob))
            for number, token, logprob in ended
        )
        self.hypotheses = sorted([*self.hypotheses, *new], key=_score, reverse=True)[: len(self.keys)]

    def _hypothesis(self, beam: Beam) -> Hypothesis:
        ended = beam.token_ids[-1] in self._end_tokens
        return Hypothesis(beam.token_ids, beam.logprob, self._scored(beam.logprob, len(beam.token_ids)), ended)

    def _scored(self, logprob: float, length: int) -> float:
        return logprob / float(length) ** self._params.length_penalty

    def _may_improve(self, going: list[_Continuation], length: int) -> bool:
        """Whether beams that have that length then are worth going on with.

        As in transformers, a beam is compared as if it ended now, although a length penalty may be kind to it later.
        """
        if len(self.hypotheses) < len(self.keys):
            return True
        best = max(logprob for _, _, logprob in going)
        return not self._params.early_stopping and self._scored(best, length) > self.hypotheses[-1].score

    def _move(self, going: list[_Continuation]) -> list[Move]:
        """Give each continuation a beam: its own parent for the first of them, so that few blocks change hands."""
        parents = {self._beams[number].key for number, _, _ in going}
        idle = [key for key in self.keys if key not in parents]
        moves, beams = [], []
        for number, token, logprob in going:
            parent, token_ids, _ = self._beams[number]
            key = parent if parent in parents else idle.pop(0)
            parents.discard(parent)
            moves.append((key, parent, token))
            beams.append(Beam(key, (*token_ids, token), logprob))
        self._beams = beams
        return moves


def go_on(searches: Sequence[BeamSearch]) -> list[list[Move]]:
    """How the beams of each search go on, of which all candidates are there; no moves for one that is `done` now."""
    alike: dict[tuple[int, int, int], list[BeamSearch]] = defaultdict(list)
    for search in searches:
        alike[search._shape].append(search)
    moves: dict[int, list[Move]] = {}
    for group in alike.values():
        for search, best in zip(group, _best(group), strict=True):
            moves[id(search)] = search._go_on(best)
    return [moves[id(search)] for search in searches]


def _best(searches: list[BeamSearch]) -> Iterator[list[_Continuation]]:
    """The best continuations of the beams of each search, best first, for searches of one shape.

    Shapes: s searches, b beams, k candidates, n continuations. In fp64, as sums over long outputs want it.
    """
    beams, count, keep = searches[0]._shape
    candidates = [search._candidates[beam.key] for search in searches for beam in search._beams]
    ids_sn, added_sn = (
        np.concatenate(column).reshape(len(searches), beams * count) for column in zip(*candidates, strict=True)
    )
    before_sb = np.array([[beam.logprob for beam in search._beams] for search in searches])
    rates_s1 = np.array([[search._params.beam_search_diversity_rate] for search in searches])
    totals_sn = before_sb.repeat(count, axis=1) + added_sn
    scores_sn = totals_sn - rates_s1 * np.tile(np.arange(count), beams)
    order_sn = (-scores_sn).argsort(axis=1, kind="stable")[:, :keep]
    tokens_sn, logprobs_sn = (np.take_along_axis(each, order_sn, axis=1) for each in (ids_sn, totals_sn))
    columns = (order_sn // count).tolist(), tokens_sn.tolist(), logprobs_sn.tolist()
    for numbers, tokens, logprobs in zip(*columns, strict=True):
        yield list(zip(numbers, tokens, logprobs, strict=True))


def _score(hypothesis: Hypothesis) -> float:
    return hypothesis.score
