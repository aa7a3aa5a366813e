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


class _Continuations(NamedTuple):
    """The best continuations of a search, best first: one list per column."""

    beams: list[int]
    """Numbers of the beams that they continue."""
    tokens: list[int]
    logprobs: list[float]
    """Sums over all tokens."""

    def take(self, places: list[int]) -> "_Continuations":
        """Those at these places."""
        beams, tokens, logprobs = self
        return _Continuations(
            [beams[place] for place in places],
            [tokens[place] for place in places],
            [logprobs[place] for place in places],
        )

    def first(self, count: int) -> "_Continuations":
        """The best of them."""
        return _Continuations(self.beams[:count], self.tokens[:count], self.logprobs[:count])


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
        self._beam_keys, self._logprobs = [keys[0]], [0.0]
        """By number. At first all beams are the same, and only one has candidates."""
        self._steps: list[tuple[list[int], list[int]]] = []
        """For each token, the numbers that the beams had before it, and what it was: by the number after it."""
        self._candidates: dict[int, Candidates] = {}

    def take(self, key: int, candidates: Candidates) -> bool:
        """Note a beam's candidates; whether those of all beams are there, so that `go_on` can follow."""
        self._candidates[key] = candidates  # those of a preempted beam may come once more
        return len(self._candidates) == len(self._beam_keys)

    def unfinished(self) -> list[Hypothesis]:
        """The beams as they are, best first, for a search that cannot be completed."""
        if not self._steps:
            return []
        beams = enumerate(self._logprobs)
        found = [self._hypothesis(self._token_ids(number), logprob) for number, logprob in beams]
        return sorted(found, key=_score, reverse=True)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Beams that have candidates, candidates of each, and how many continuations are looked at."""
        ids_k, _ = self._candidates[self._beam_keys[0]]
        return len(self._beam_keys), len(ids_k), self._keep

    def _go_on(self, best: _Continuations) -> list[Move]:
        """Go on with the best continuations; no moves once it is `done`."""
        self._candidates = {}
        width = len(self.keys)
        at_end = len(self._steps) + 1 >= self._max_tokens
        # What comes after as many as there are beams is there only to go on where those end.
        going = best.first(width)
        if at_end:
            self._conclude(going)
            going = going.first(0)
        elif not self._end_tokens.isdisjoint(going.tokens):
            ends = [token in self._end_tokens for token in best.tokens]
            self._conclude(going.take([place for place in range(len(going.tokens)) if ends[place]]))
            going = best.take([place for place, end in enumerate(ends) if not end][:width])
        self.done = not going.tokens or not self._may_improve(max(going.logprobs))
        return [] if self.done else self._move(going)

    def _token_ids(self, number: int) -> tuple[int, ...]:
        """The output of a beam."""
        tokens = []
        for numbers, chosen in reversed(self._steps):
            tokens.append(chosen[number])
            number = numbers[number]
        return tuple(reversed(tokens))

    def _conclude(self, ended: _Continuations) -> None:
        """Keep what has ended, if it is among the best."""
        new = (
            self._hypothesis((*self._token_ids(number), token), logprob)
            for number, token, logprob in zip(*ended, strict=True)
        )
        self.hypotheses = sorted([*self.hypotheses, *new], key=_score, reverse=True)[: len(self.keys)]

    def _hypothesis(self, token_ids: tuple[int, ...], logprob: float) -> Hypothesis:
        ended = token_ids[-1] in self._end_tokens
        return Hypothesis(token_ids, logprob, self._scored(logprob, len(token_ids)), ended)

    def _scored(self, logprob: float, length: int) -> float:
        return logprob / float(length) ** self._params.length_penalty

    def _may_improve(self, best: float) -> bool:
        """Whether it is worth going on with beams of which the best has that sum of log-probabilities.

        As in transformers, a beam is compared as if it ended now, although a length penalty may be kind to it later.
        """
        if len(self.hypotheses) < len(self.keys):
            return True
        if self._params.early_stopping:
            return False
        return self._scored(best, len(self._steps) + 1) > self.hypotheses[-1].score

    def _move(self, going: _Continuations) -> list[Move]:
        """Give each continuation a beam: its own parent for the first of them, so that few blocks change hands."""
        numbers, tokens, self._logprobs = going
        self._steps.append((numbers, tokens))
        parents = [self._beam_keys[number] for number in numbers]
        unclaimed = set(parents)
        if len(unclaimed) == len(self.keys):
            self._beam_keys = parents
            return [(key, key, token) for key, token in zip(parents, tokens, strict=True)]
        idle = (key for key in self.keys if key not in parents)
        keys = []
        for parent in parents:
            keys.append(parent if parent in unclaimed else next(idle))
            unclaimed.discard(parent)
        self._beam_keys = keys
        return list(zip(keys, parents, tokens, strict=True))


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


def _best(searches: list[BeamSearch]) -> Iterator[_Continuations]:
    """The best continuations of the beams of each search, best first, for searches of one shape.

    Shapes: s searches, b beams, k candidates, n continuations. In fp64, as sums over long outputs want it.
    """
    beams, count, keep = searches[0]._shape
    candidates = [search._candidates[key] for search in searches for key in search._beam_keys]
    ids_sn, added_sn = (
        np.concatenate(column).reshape(len(searches), beams * count) for column in zip(*candidates, strict=True)
    )
    before_sb = np.array([search._logprobs for search in searches])
    rates_s1 = np.array([[search._params.beam_search_diversity_rate] for search in searches])
    totals_sn = before_sb.repeat(count, axis=1) + added_sn
    scores_sn = totals_sn - rates_s1 * np.tile(np.arange(count), beams)
    order_sn = (-scores_sn).argsort(axis=1, kind="stable")[:, :keep]
    tokens_sn, logprobs_sn = (np.take_along_axis(each, order_sn, axis=1) for each in (ids_sn, totals_sn))
    columns = (order_sn // count).tolist(), tokens_sn.tolist(), logprobs_sn.tolist()
    yield from map(_Continuations, *columns)


def _score(hypothesis: Hypothesis) -> float:
    return hypothesis.score
