"""Readers of answers: from the text that a model writes to what of it is text, reasoning and calls, piece by piece.

The time is linear in the text, however it is cut, and what is held back is bounded: a mark that has begun, spaces, and
what stands before a function's name.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

MAX_SPACE = 1024
"""Characters, of spaces and of what names a call: what is longer is text."""
_SPACE = re.compile(r"\s*")


class TextPiece(NamedTuple):
    """Text that is no call."""

    text: str


class ReasoningPiece(NamedTuple):
    """Text that the model wrote for itself, before its answer."""

    text: str


class CallPiece(NamedTuple):
    """The beginning of a call, which has its name, or more of its arguments' JSON."""

    number: int
    """Which of the answer's calls it belongs to."""
    name: str | None
    arguments: str


Piece = TextPiece | ReasoningPiece | CallPiece
Span = tuple[int, int | None]
"""Characters of a text: from the first, and up to the second; None: it has not ended."""
Step = Callable[[str, int, bool], int]


class AnswerReader(Protocol):
    """Reads one answer."""

    @property
    def calls(self) -> int:
        """Calls that have begun."""
        ...

    @property
    def reasoned(self) -> Sequence[Span]:
        """Where reasoning stands in the text so far, with its marks."""
        ...

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text brings."""
        ...

    def end(self) -> list[Piece]:
        """The pieces that the end of the text brings."""
        ...


class TextReader:
    """Reads an answer that is text and nothing else."""

    calls = 0
    reasoned: Sequence[Span] = ()

    def feed(self, text: str) -> list[Piece]:
        """See AnswerReader."""
        return [TextPiece(text)] if text else []

    def end(self) -> list[Piece]:
        """See AnswerReader."""
        return []


class StepReader:
    """A reader that goes from step to step.

    A step takes some of the text from `at` on and gives where it ended: `at` itself, without a new step, where only
    more text can decide. With `last` no more will come. Of more calls than `max_calls` nothing is given.
    """

    def __init__(self, begin: Step, max_calls: int | None = None) -> None:
        self.calls = 0
        """Calls that have begun."""
        self._fed = 0
        """Characters so far."""
        self._step = begin
        self._max_calls = max_calls
        self._pending = ""
        """What may be the beginning of a mark."""
        self._space = ""
        """Spaces before which there was no text, or a call."""
        self._after_call = True
        self._has_arguments = False
        self._pieces: list[Piece] = []
        self._held: list[str] = []
        """Text of a call whose name is not known yet."""

    @property
    def reasoned(self) -> Sequence[Span]:
        """See AnswerReader."""
        return ()

    def feed(self, text: str) -> list[Piece]:
        """See AnswerReader."""
        return self._run(text, last=False)

    def end(self) -> list[Piece]:
        """See AnswerReader."""
        self._run("", last=True)
        self._finish()
        if held := self._dropped():
            self._put_text(held)
        if self._space and not self.calls:
            self._pieces.append(TextPiece(self._space))
        return self._taken()

    def _finish(self) -> None:
        """Give what is still held when the answer ends."""

    def _run(self, text: str, *, last: bool) -> list[Piece]:
        self._fed += len(text)
        text, self._pending = self._pending + text, ""
        at = 0
        while at < len(text):
            step = self._step
            new = step(text, at, last)
            if new == at and self._step == step:
                self._pending = text[at:]
                break
            at = new
        return [] if last else self._taken()

    def _dropped(self) -> str:
        """What is held, and is not any more."""
        text = "".join(self._held)
        self._held.clear()
        return text

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _begin_call(self, name: str) -> None:
        self._has_arguments, self._space = False, ""
        self.calls += 1
        if self._is_shown:
            self._pieces.append(CallPiece(self.calls - 1, name, ""))

    def _put_arguments(self, text: str) -> None:
        if text and self._is_shown:
            self._pieces.append(CallPiece(self.calls - 1, None, text))
        self._has_arguments = self._has_arguments or bool(text)

    @property
    def _is_shown(self) -> bool:
        return self._max_calls is None or self.calls <= self._max_calls

    def _put_text(self, text: str) -> None:
        """Give text, but no spaces alone before the first text and behind calls."""
        if self._after_call and not text.strip() and len(self._space) <= MAX_SPACE:
            self._space += text
            return
        if text or self._space:
            self._pieces.append(TextPiece(self._space + text))
        self._space, self._after_call = "", False


def space_end(text: str, at: int) -> int:
    """Where the spaces end that begin at `at`."""
    match = _SPACE.match(text, at)
    assert match is not None, "it matches anything"
    return match.end()


def begun_mark(text: str, at: int, mark: str) -> int:
    """Characters at the end of a text, from `at` on, with which the mark may begin."""
    longest = min(len(mark) - 1, len(text) - at)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)
