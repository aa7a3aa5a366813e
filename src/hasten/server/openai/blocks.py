"""Answers as blocks, each of text, of reasoning or of a call, as messages and responses have them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec

from hasten.core.errors import HastenError
from hasten.server.openai.answer import Usage
from hasten.server.openai.choices import ChatOutput, Choice
from hasten.server.tools.reader import CallPiece, Piece

_encode = msgspec.json.Encoder().encode
Block = dict[str, Any]
Event = dict[str, Any]


class BlockForm(ABC):
    """See AnswerForm. Blocks stand in the order in which the model began them, in a whole answer as in its events."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        """The last one has not ended where `_kind` is not None."""
        self._kind: type[Piece] | None = None
        self._texts: list[str] = []
        """Pieces of the last block's text, or of its arguments."""
        self._last: ChatOutput | None = None
        """What ended the answer."""
        self._events = 0
        """Written so far."""

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """See AnswerForm."""
        for _ in chain(self._take(choices), self._finish()):
            pass
        choices.clear()
        return _encode(self._answer(usage))

    def events(self, pieces: Sequence[Choice], usage: Usage) -> bytes:
        """See AnswerForm."""
        return self._written(chain(() if self._events else self._begin(usage), self._take(pieces)))

    def end(self, usage: Usage) -> bytes:
        """See AnswerForm."""
        return self._written(chain(self._finish(), self._end(usage)))

    @abstractmethod
    def error(self, error: HastenError) -> bytes:
        """See AnswerForm."""

    @abstractmethod
    def _answer(self, usage: Usage) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def _begin(self, usage: Usage) -> Iterable[Event]:
        """What an answer begins with."""

    @abstractmethod
    def _end(self, usage: Usage) -> Iterable[Event]:
        """What stands behind the last block."""

    @abstractmethod
    def _begin_block(self, part: Piece) -> Iterator[Event]:
        """Add a block of a part's kind to `_blocks`, as yet without text."""

    @abstractmethod
    def _more(self, text: str, output: ChatOutput) -> Event:
        """More text of the last block, or of its arguments."""

    @abstractmethod
    def _end_block(self, text: str) -> Iterator[Event]:
        """The end of the last block, which has this text in all."""

    def _take(self, outputs: Sequence[Choice]) -> Iterator[Event]:
        for output in outputs:
            assert isinstance(output, ChatOutput), "it is a chat's"
            for part in output.parts:
                yield from self._take_part(part, output)
            if output.finish_reason is not None:
                self._last = output

    def _take_part(self, part: Piece, output: ChatOutput) -> Iterator[Event]:
        begins_call = isinstance(part, CallPiece) and part.name is not None
        text = part.arguments if isinstance(part, CallPiece) else part.text
        if not (begins_call or text or output.tokens):
            return
        if begins_call or self._kind is not type(part):
            yield from self._finish()
            self._kind = type(part)
            self._texts.clear()
            yield from self._begin_block(part)
        if not begins_call:
            self._texts.append(text)
            yield self._more(text, output)

    def _finish(self) -> Iterator[Event]:
        """The end of the last block, if it has not ended."""
        if self._kind is not None:
            yield from self._end_block("".join(self._texts))
            self._kind = None

    def _written(self, events: Iterable[Event]) -> bytes:
        """Each event before the next one changes the blocks."""
        written = b""
        for event in events:
            written += b"event: " + event["type"].encode() + b"\ndata: " + _encode(self._numbered(event)) + b"\n\n"
            self._events += 1
        return written

    def _numbered(self, event: Event) -> Event:
        return event
