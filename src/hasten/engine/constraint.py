"""Output that keeps to a grammar: which tokens may come next. Never imports torch.

Each sequence has a state of its own in its compiled grammar (`grammar.py`), which names the tokens that may follow and
moves on with each token chosen. The end token is among them only where the text so far is whole.
"""

import time
from collections.abc import Callable, Sequence
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
_FEW_WORDS = 1 << 12
"""Of masks that are found on the thread that wants them, in some 0.3 ms: to wake others, which on a CPU compete with
those that compute the model, takes longer."""


class Constraint:
    """How far one sequence has come in its grammar."""

    def __init__(self, matcher: "LLMatcher", words: int, lock: int = 0) -> None:
        self.matcher = matcher
        self.lock = lock
        """Number of the lock that it shares with some others of its grammar."""
        self.words = words
        """Of 32 tokens each, in a mask of the vocabulary."""
        self.is_suspect = False
        """Whether it may be what made the last masks slow: its next one is found by itself."""
        self._clock: Callable[[], float] = time.perf_counter
        """Its CPU time counts once it has taken long, if perhaps because others had the CPU."""
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
        clock, matcher = self._clock, self.matcher
        began = clock()
        matcher.consume_token(token)
        if (seconds := clock() - began) > _USUAL_SECONDS:
            self._note(seconds)
        return matcher.is_stopped() and self.error is None

    def forced(self) -> list[int]:
        """The tokens that have to come next, up to where there is a choice or the text is whole."""
        clock = self._clock
        began = clock()
        tokens: list[int] = self.matcher.compute_ff_tokens()
        if (seconds := clock() - began) > _USUAL_SECONDS:
            self._note(seconds)
        return tokens

    def fill_mask(self, mask: int, size: int) -> None:
        """Which tokens may come next, into so many bytes at an address."""
        clock = self._clock
        began = clock()
        self.matcher.unsafe_compute_mask_ptr(mask, size)
        seconds = clock() - began
        self.is_suspect = seconds > _USUAL_SECONDS
        if self.is_suspect:
            self._note(seconds)

    def _note(self, seconds: float) -> None:
        """Take note that a token has taken longer than usual.

        The first time that is by the clock, as asking for CPU time takes ten times as long.
        """
        if self._clock is time.perf_counter:
            self._clock = time.thread_time
            return
        self._excess += seconds - _USUAL_SECONDS
        self._too_slow = self._too_slow or seconds > _MOST_SECONDS or self._excess > _MOST_EXCESS

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further."""
        if self.matcher.is_error():
            return one_line(self.matcher.get_error())
        if self._too_slow:
            return "finding the next token takes too long; make the grammar less ambiguous"
        return None


def fill_allowed(constraints: Sequence[Constraint], masks: NDArray[np.int32]) -> None:
    """Write which tokens may come next, [sequences, words]: bit i of word w stands for token 32 * w + i.

    Behind a text that is whole any may.
    """
    address, size = masks.ctypes.data, 4 * masks.shape[1]
    several: list[tuple[Constraint, int]] = []
    for row, constraint in enumerate(constraints):
        if constraint.matcher.is_stopped():
            masks[row] = -1
        elif constraint.is_suspect:
            constraint.fill_mask(address + row * size, size)
        else:
            several.append((constraint, row))
    if not several:
        return
    began, usual = time.perf_counter(), _USUAL_SECONDS
    if masks.size <= _FEW_WORDS:
        for constraint, row in several:
            constraint.matcher.unsafe_compute_mask_ptr(address + row * size, size)
    else:
        # Each thread takes some that follow one another: by lock, it seldom waits for another thread.
        usual *= 1 + len(several)
        several.sort(key=lambda each: each[0].lock)
        matchers = [(constraint.matcher, row) for constraint, row in several]
        _executor().unsafe_compute_mask_ptr(matchers, address, size, len(masks))
    if time.perf_counter() - began > usual:
        for constraint, _ in several:  # whose fault it is shows only one by one
            constraint.is_suspect = True


@cache
def _executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor()
