"""Beam search: which continuations live on, and when it ends. Never imports torch.

A request has `beam_width` sequences, its beams. Once each beam has told the most probable tokens that may follow it,
the best continuations of all beams together are chosen. Those that end become hypotheses; the others take the beams'
places, and `Move` says whose continuation each beam is from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest

from hasten.core.types import SamplingParams

Candidate = tuple[int, float]
"""A token that may come next, and its log-probability."""
Move = tuple[int, int, int]
"""A beam's key, the key of the beam that it continues, and the token that comes next."""


def end_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """Tokens that end a completion."""
    return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)


def candidate_count(params: SamplingParams, eos_token_ids: Sequence[int]) -> int:
    """How many continuations to look at: enough that `beam_width` of them go on, whatever ends."""
    return max(2, 1 + len(end_tokens(params, eos_token_ids))) * params.beam_width


@dataclass(frozen=True)
class Beam:
    """A completion under way."""

    key: int
    """Of its sequence."""
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    """Sum over its tokens."""


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
        self._beams = [Beam(keys[0])]  # at first all are the same, and only one of them is asked
        self._told: dict[int, list[Candidate]] = {}

    def take(self, key: int, candidates: list[Candidate]) -> list[Move]:
        """Note a beam's candidates, the most probable first.

        Returns how the beams go on, once all of them are there and unless the search is `done` then.
        """
        self._told[key] = candidates  # a preempted beam may tell them once more
        if len(self._told) < len(self._beams):
            return []
        best = self._best()
        self._told = {}
        self._conclude(best)
        going = [beam for beam in best if not self._ends(beam)][: len(self.keys)]
        self.done = not going or not self._may_improve(max(beam.logprob for beam in going))
        return [] if self.done else self._move(going)

    def unfinished(self) -> list[Hypothesis]:
        """The beams as they are, best first, for a search that cannot be completed."""
        if not self._beams[0].token_ids:
            return []
        return sorted((self._hypothesis(beam) for beam in self._beams), key=_score, reverse=True)

    def _best(self) -> list[Beam]:
        """The best continuations of all beams, under the key of the beam that each continues."""
        rate = self._params.beam_search_diversity_rate
        ranked: list[tuple[float, Beam]] = []
        for beam in self._beams:
            for rank, (token, logprob) in enumerate(self._told[beam.key]):
                total = beam.logprob + logprob
                ranked.append((total - rate * rank, Beam(beam.key, (*beam.token_ids, token), total)))
        return [beam for _, beam in nlargest(self._keep, ranked, key=lambda pair: pair[0])]

    def _ends(self, beam: Beam) -> bool:
        return beam.token_ids[-1] in self._end_tokens or len(beam.token_ids) >= self._max_tokens

    def _hypothesis(self, beam: Beam) -> Hypothesis:
        ended = beam.token_ids[-1] in self._end_tokens
        return Hypothesis(beam.token_ids, beam.logprob, self._scored(beam.logprob, len(beam.token_ids)), ended)

    def _scored(self, logprob: float, length: int) -> float:
        return logprob / float(length) ** self._params.length_penalty

    def _conclude(self, best: list[Beam]) -> None:
        """Keep what ends among the best; what comes after those is there only to go on if they do not."""
        width = len(self.keys)
        ended = [self._hypothesis(beam) for beam in best[:width] if self._ends(beam)]
        self.hypotheses = sorted([*self.hypotheses, *ended], key=_score, reverse=True)[:width]

    def _may_improve(self, logprob: float) -> bool:
        """Whether beams, the best of which has this sum, are worth going on with.

        As in transformers, a beam is compared as if it ended now, although a length penalty may be kind to it later.
        """
        if len(self.hypotheses) < len(self.keys):
            return True
        length = len(self._beams[0].token_ids) + 1
        return not self._params.early_stopping and self._scored(logprob, length) > self.hypotheses[-1].score

    def _move(self, going: list[Beam]) -> list[Move]:
        """Give each continuation a beam: its own parent for the first of them, so that few blocks change hands."""
        parents = {beam.key for beam in going}
        idle = [key for key in self.keys if key not in parents]
        moves, beams = [], []
        for beam in going:
            key = beam.key if beam.key in parents else idle.pop(0)
            parents.discard(beam.key)
            moves.append((key, beam.key, beam.token_ids[-1]))
            beams.append(Beam(key, beam.token_ids, beam.logprob))
        self._beams = beams
        return moves


def _score(hypothesis: Hypothesis) -> float:
    return hypothesis.score
