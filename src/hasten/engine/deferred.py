"""Work of a start that the first token does not need: done later, in short pieces.

Every rank has the same pieces under the same numbers, and rank 0 says which is done when, between two steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hasten.engine.step_message import Numbers

_MARK = -1
"""Where a step's message has its number, which is not negative."""
_LARGEST_SHARE = 0.05
"""Part of the time that pieces may take while requests are computed, where someone waits for each token."""


@dataclass(frozen=True)
class Piece:
    """A part of the work."""

    name: str
    """For messages: what it makes."""
    do: Callable[[], None]


class Deferred:
    """The pieces that are left."""

    def __init__(self) -> None:
        self._left: dict[int, Piece] = {}
        self._count = 0

    def add(self, piece: Piece) -> int:
        """Add a piece behind the others; its number."""
        self._left[self._count] = piece
        self._count += 1
        return self._count - 1

    @property
    def next(self) -> int | None:
        """Number of the piece that comes next; None where none is left."""
        return next(iter(self._left), None)

    def __contains__(self, number: int) -> bool:
        return number in self._left

    def take(self, number: int) -> Piece:
        """A piece that is to be done now; it is not left any more, whatever becomes of it."""
        return self._left.pop(number)

    def clear(self) -> None:
        """Let go of all of them."""
        self._left.clear()


class Budget:
    """When pieces may be done although requests wait for the next step."""

    def __init__(self, *, interactive: bool) -> None:
        """`interactive`: whether someone waits for each token; else all requests together count, and now is best."""
        self._interactive = interactive
        self._next = 0.0
        """Not before then."""

    @property
    def allows(self) -> bool:
        """Whether a piece may be done now."""
        return not self._interactive or time.monotonic() >= self._next

    def spend(self, seconds: float) -> None:
        """Note how long a piece took."""
        self._next = time.monotonic() + seconds / _LARGEST_SHARE


def packed(number: int) -> Numbers:
    """The message by which rank 0 says that a piece is done now."""
    return np.array([_MARK, number], dtype=np.int32)


def unpacked(numbers: Numbers) -> int | None:
    """The piece that a message names; None where it is a step's."""
    return int(numbers[1]) if numbers[0] == _MARK else None
