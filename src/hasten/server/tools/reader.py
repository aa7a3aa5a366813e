"""Readers of answers: from the text that a model writes to what of it is text, reasoning and calls, piece by piece.

The time is linear in the text, however it is cut, and what is held back is bounded: a mark that has begun, spaces, and
what stands before a function's name.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TypeVar

import msgspec

MAX_SPACE = 1024
"""Characters, of spaces and of what names a call: what is longer is text."""
SPACE = re.compile(r"\s*")


class TextPiece(msgspec.Struct, gc=False):
    """Text that is no call."""

    text: str


class ReasoningPiece(msgspec.Struct, gc=False):
    """Text that the model wrote for itself, before its answer."""

    text: str


class CallPiece(msgspec.Struct, gc=False):
    """The beginning of a call, which has its name, or more of its arguments' JSON."""

    number: int
    """Which of the answer's calls it belongs to."""
    name: str | None
    arguments: str
    id: str | None = None
    """Which the beginning gets for its client; no model writes it."""


Piece = TextPiece | ReasoningPiece | CallPiece
Span = tuple[int, int | None]
"""Characters of a text: from the first, and up to the second; None: it has not ended."""
Result = TypeVar("Result")
Reading = Generator[None, None, Result]
"""A part of a reader, which yields where it needs more text."""


class BrokenOffError(Exception):
    """What was being read does not go on: the text ends, or shows that it is something else."""


class AnswerReader(ABC):
    """Reads one answer. Of more calls than `max_calls` nothing is given.

    `_read` reads on from `_at`. What it holds is text once it raises BrokenOffError.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self.calls = 0
        """Calls that have begun."""
        self.reasoned: list[Span] = []
        """Where reasoning stands in the text so far, with its marks."""
        self._max_calls = max_calls
        self._text, self._at = "", 0
        """What is not read or not decided yet, and how much of it is read."""
        self._last = False
        """Whether no more text will come."""
        self._fed = 0
        """Characters so far."""
        self._held: int | None = None
        """Where the text begins of which is not known yet whether it is a call."""
        self._most_held = MAX_SPACE
        self._space = ""
        """Spaces before which there was no text, or a call."""
        self._after_call = True
        self._has_arguments = False
        self._pieces: list[Piece] = []
        self._steps = self._all()

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text brings."""
        self._fed += len(text)
        kept = self._at if self._held is None else self._held
        self._text, self._at = self._text[kept:] + text, self._at - kept
        self._held = None if self._held is None else 0
        next(self._steps)
        pieces = self._pieces.copy()
        self._pieces.clear()
        return pieces

    def end(self) -> list[Piece]:
        """The pieces that the end of the text brings."""
        self._last = True
        for _ in self._steps:
            pass
        if self._space and not self.calls:
            self._pieces.append(TextPiece(self._space))
        return self._pieces

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read some of the answer."""

    def _all(self) -> Reading[None]:
        while not self._last or self._at < len(self._text):
            try:
                yield from self._read()
            except BrokenOffError:
                self._release()

    def _more(self) -> Reading[None]:
        """Wait for more text; BrokenOffError where none comes, or too much is held."""
        if self._last or (self._held is not None and self._at - self._held > self._most_held):
            raise BrokenOffError
        yield

    def _rest(self) -> Reading[str]:
        """All text that is there, or the next that comes."""
        while self._at == len(self._text):
            yield from self._more()
        text, self._at = self._text[self._at :], len(self._text)
        return text

    def _skip(self, pattern: "re.Pattern[str]", put: Callable[[str], None] | None = None) -> Reading[str]:
        """Pass over, and give, what matches a pattern; returns the first character that does not."""
        while True:
            match = pattern.match(self._text, self._at)
            assert match is not None, "it matches anything"
            self._at = match.end()
            if put is not None:
                put(match[0])
            if self._at < len(self._text):
                return self._text[self._at]
            yield from self._more()

    def _sees(self, mark: str) -> Reading[bool]:
        """Whether a mark is next."""
        while not self._last and len(self._text) - self._at < len(mark) and self._may_begin(mark):
            yield
        return self._text.startswith(mark, self._at)

    def _may_begin(self, mark: str) -> bool:
        return mark.startswith(self._text[self._at : self._at + len(mark)])

    def _closes(self, mark: str) -> Reading[bool]:
        """Pass over the mark behind a call, if it is next: one that the answer's end cuts is no text for that."""
        is_next = (yield from self._sees(mark)) or self._may_begin(mark)
        if is_next:
            self._at = min(self._at + len(mark), len(self._text))
        return is_next

    def _until(self, put: Callable[[str], None], *marks: str) -> Reading[str]:
        """Give the text up to the first of some marks, and return that; "" at the text's end."""
        pattern = _whole_or_begun(marks)
        while True:
            found = pattern.search(self._text, self._at)
            mark = None if found is None else found[1]
            end = len(self._text) if found is None or (self._last and mark is None) else found.start()
            if end > self._at:
                put(self._text[self._at : end])
                self._at = end
            if mark is not None or self._last:
                return mark or ""
            yield

    def _find(self, mark: str) -> Reading[int]:
        """Where a mark stands behind a name; negative where it does not come."""
        while (found := self._text.find(mark, self._at, self._at + MAX_SPACE)) < 0:
            if self._last or len(self._text) - self._at > MAX_SPACE:
                break
            yield
        return found

    @property
    def _position(self) -> int:
        """Characters of the answer that are read."""
        return self._fed - len(self._text) + self._at

    def _hold(self) -> None:
        """Hold what is read from here on."""
        self._held, self._most_held = self._at, MAX_SPACE

    def _release(self) -> None:
        """What was held was no call."""
        if self._held is not None:
            held, self._held = self._held, None
            self._put_text(self._text[held : self._at])

    def _begin_call(self, name: str) -> None:
        """What was held is a call."""
        self._held = None
        self._has_arguments, self._space = False, ""
        self.calls += 1
        if self._is_shown:
            self._pieces.append(CallPiece(self.calls - 1, name, ""))

    def _put_arguments(self, text: str) -> None:
        if text and self._is_shown:
            self._pieces.append(CallPiece(self.calls - 1, None, text))
        self._has_arguments = self._has_arguments or bool(text)

    def _end_call(self) -> None:
        self._after_call = True
        if not self._has_arguments:
            self._put_arguments("{}")

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


class TextReader(AnswerReader):
    """Reads an answer that is text and nothing else."""

    def _read(self) -> Reading[None]:
        self._pieces.append(TextPiece((yield from self._rest())))


@cache
def _whole_or_begun(marks: tuple[str, ...]) -> "re.Pattern[str]":
    """Finds the first of some marks, as its first group, or what one may begin with at the end of a text."""
    begun = [mark[:length] for mark in marks for length in range(1, len(mark))]
    return re.compile(f"({_any_of(marks)})|(?:{_any_of(begun)})\\Z")


def _any_of(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, texts))
