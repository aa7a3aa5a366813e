"""Output that keeps to a grammar: which tokens may come next. Never imports torch.

Each sequence has a state of its own in its compiled grammar (`grammar.py`), which names the tokens that may follow and
moves on with each token chosen. The end token is among them only where the text so far is whole.
"""

import time
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.engine.grammar import Grammar
from hasten.engine.grammar_text import one_line

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_MOST_SECONDS = 0.05
"""Of CPU time for one token of one sequence: with an ambiguous grammar it grows with the length of the output."""
_USUAL_SECONDS, _MOST_EXCESS = 0.005, 1.0
"""What more tokens of a sequence take than this may add up to so much."""


class Constraint:
    """How far one sequence has come in its grammar."""

    def __init__(self, matcher: "LLMatcher", words: int, lock: int = 0) -> None:
        self.matcher = matcher
        self.lock = lock
        """Number of the lock that it shares with some others of its grammar."""
        self.words = words
        """Of 32 tokens each, in a mask of the vocabulary."""
        self.suspect = False
        """Whether it may be what made the last masks slow: its next one is timed."""
        self._too_slow = False
        self._excess = 0.0

    @classmethod
    def begin(cls, grammar: Grammar) -> "Constraint":
        """The state of a sequence without output."""
        lock, matcher = grammar.next_matcher()
        return cls(matcher, grammar.words, lock)

    def fork(self) -> "Constraint":
        """The same state for a sibling."""
        return Constraint(self.matcher.deep_copy(), self.words, self.lock)

    def accept(self, token: int) -> bool:
        """Move on by a token; whether the text is then whole and nothing may follow it."""
        began = time.thread_time()
        self.matcher.consume_token(token)
        self._note(time.thread_time() - began)
        return self.error is None and self.matcher.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that have to come next, up to where there is a choice or the text is whole."""
        if self.is_over:
            return []
        began = time.thread_time()
        tokens: list[int] = self.matcher.compute_ff_tokens()
        self._note(time.thread_time() - began)
        return tokens

    def fill_mask(self, masks: NDArray[np.int32], row: int) -> None:
        """Which tokens may come next, into a row of masks; takes note of the time."""
        from llguidance.numpy import fill_next_token_bitmask

        began = time.thread_time()
        fill_next_token_bitmask(self.matcher, masks, row)
        seconds = time.thread_time() - began
        self.suspect = seconds > _USUAL_SECONDS
        self._note(seconds)

    def _note(self, seconds: float) -> None:
        self._excess += max(0.0, seconds - _USUAL_SECONDS)
        self._too_slow = self._too_slow or seconds > _MOST_SECONDS or self._excess > _MOST_EXCESS

    @property
    def is_over(self) -> bool:
        """Whether no token may follow: the text is whole, or its grammar cannot be followed."""
        return self.matcher.is_stopped() or self.matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further."""
        if self.matcher.is_error():
            return one_line(self.matcher.get_error())
        if self._too_slow:
            return "finding the next token takes too long; make the grammar less ambiguous"
        return None


def fill_allowed(constraints: Sequence[Constraint], masks: NDArray[np.int32]) -> None:
    """Write which tokens may come next, [sequences, words]: bit i of word w stands for token 32 * w + i."""
    from llguidance.numpy import fill_next_token_bitmask_par

    rows = list(enumerate(constraints))
    for row, constraint in rows:
        if constraint.suspect:
            constraint.fill_mask(masks, row)
    # Each thread takes some that follow one another: by lock, it seldom waits for another thread.
    quick = sorted((row for row in rows if not row[1].suspect), key=lambda row: row[1].lock)
    matchers = [(constraint.matcher, row) for row, constraint in quick]
    if not matchers:
        return
    began = time.perf_counter()
    fill_next_token_bitmask_par(_executor(), matchers, masks)
    if time.perf_counter() - began > _USUAL_SECONDS * (1 + len(matchers)):
        for constraint in constraints:  # whose fault it is shows only one by one
            constraint.suspect = True


@cache
def _executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor()
