"""Beam search: its state on the host, and when it ends. Never imports torch.

A request has `beam_width` sequences, its beams, which have numbers. Which continuations of all beams together are the
best, and which beam each of them becomes, is chosen where the candidates are (`ops.choose_beams`). The host hears of it
while the next step is computed: it keeps the completions that have ended, the hypotheses, and how to get to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from hasten.core.types import SamplingParams


def end_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """Tokens that end a completion."""
    return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)


def candidate_count(params: SamplingParams, eos_token_ids: Sequence[int]) -> int:
    """How many continuations to look at: enough that `beam_width` of them go on, whatever ends."""
    return max(2, 1 + len(end_tokens(params, eos_token_ids))) * params.beam_width


class Continuations(NamedTuple):
    """Continuations of a search: one list per column."""

    beams: list[int]
    """Numbers of the beams that they continue."""
    tokens: list[int]
    logprobs: list[float]
    """Sums over all tokens."""


class BeamStep(NamedTuple):
    """What was chosen for a search in one step."""

    beams: Continuations
    """What each beam is from now on, by number."""
    best: Continuations
    """The best continuations, whether they end or go on, best first: as many as there are beams."""


@dataclass(frozen=True)
class Hypothesis:
    """A completion that is one of the best so far."""

    token_ids: tuple[int, ...]
    sums: tuple[float, ...]
    """Of the log-probabilities up to each of its tokens."""
    score: float
    """What completions are compared by."""
    ended: bool
    """Whether its last token ended it, and not the greatest length."""

    @property
    def logprob(self) -> float:
        """Sum over its tokens."""
        return self.sums[-1] if self.sums else 0.0

    @property
    def token_logprobs(self) -> list[float]:
        """Of each of its tokens."""
        return [later - before for before, later in pairwise((0.0, *self.sums))]


class BeamSearch:
    """The beams of one request."""

    def __init__(self, params: SamplingParams, eos_token_ids: Sequence[int], max_tokens: int, keys: list[int]) -> None:
        self.keys = keys
        """Of its sequences, by number."""
        self.done = False
        self.hypotheses: list[Hypothesis] = []
        """Best first, never more than there are beams."""
        self._params = params
        self._max_tokens = max_tokens
        self._end_tokens = end_tokens(params, eos_token_ids)
        self._steps: list[Continuations] = []
        """What the beams became in each step."""

    def go_on(self, step: BeamStep) -> None:
        """Take what was chosen in the next step; the search may be `done` then."""
        beams, best = step
        at_end = len(self._steps) + 1 >= self._max_tokens
        if at_end or not self._end_tokens.isdisjoint(best.tokens):
            self._conclude(zip(*best, strict=True), at_end=at_end)
        self.done = at_end or not self._may_improve(max(beams.logprobs))
        if not self.done:
            self._steps.append(beams)

    def unfinished(self) -> list[Hypothesis]:
        """The beams as they are, best first, for a search that cannot be completed."""
        if not self._steps:
            return []
        found = [self._hypothesis(*self._output(number)) for number in range(len(self._steps[-1].tokens))]
        return sorted(found, key=_score, reverse=True)

    def _output(self, number: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The tokens of a beam, and the sums of log-probabilities up to each."""
        tokens, sums = [], []
        for step in reversed(self._steps):
            tokens.append(step.tokens[number])
            sums.append(step.logprobs[number])
            number = step.beams[number]
        return tuple(reversed(tokens)), tuple(reversed(sums))

    def _conclude(self, best: "zip[tuple[int, int, float]]", *, at_end: bool) -> None:
        """Keep what has ended, or all at the end, if it is among the best."""
        new = []
        for number, token, logprob in best:
            if at_end or token in self._end_tokens:
                tokens, sums = self._output(number)
                new.append(self._hypothesis((*tokens, token), (*sums, logprob)))
        self.hypotheses = sorted([*self.hypotheses, *new], key=_score, reverse=True)[: len(self.keys)]

    def _hypothesis(self, token_ids: tuple[int, ...], sums: tuple[float, ...]) -> Hypothesis:
        ended = token_ids[-1] in self._end_tokens
        return Hypothesis(token_ids, sums, self._scored(sums[-1], len(token_ids)), ended)

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


def _score(hypothesis: Hypothesis) -> float:
    return hypothesis.score
