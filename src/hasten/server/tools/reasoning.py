"""What a model writes for itself before it answers: its marks, whether a prompt has begun it, and its reader."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hasten.core.config import REASONING_PARSERS
from hasten.server.tools.reader import (
    MAX_SPACE,
    AnswerReader,
    Piece,
    ReasoningPiece,
    Span,
    TextPiece,
    begun_mark,
    space_end,
)


class Stage(Enum):
    """How far an answer's reasoning is where a prompt ends."""

    AHEAD = "ahead"
    """The answer may begin with it."""
    INSIDE = "inside"
    """The answer goes on with it."""


@dataclass(frozen=True)
class ReasoningForm:
    """How a model marks its reasoning."""

    name: str
    """As `--reasoning-parser` has it."""
    opening: str
    closing: str
    begins_inside: bool = False
    """Whether an answer begins with reasoning where its prompt says nothing of it."""

    def stage(self, prompt: str, continued: str | None = None) -> Stage | None:
        """Where the reasoning is at the end of a prompt; None: over.

        `continued` is the message that the answer continues, which the prompt ends with.
        """
        if continued is not None:
            opened, closed = continued.rfind(self.opening), continued.rfind(self.closing)
            return Stage.INSIDE if opened > closed else None
        text = prompt.rstrip()
        if text.endswith(self.closing):
            return None
        is_inside = self.begins_inside or text.endswith(self.opening)
        return Stage.INSIDE if is_inside else Stage.AHEAD


HARMONY = ReasoningForm("openai_gptoss", "<|channel|>analysis<|message|>", "<|end|>")
_FORMS = (
    ReasoningForm("deepseek_r1", "<think>", "</think>", begins_inside=True),
    ReasoningForm("qwen3", "<think>", "</think>"),
    ReasoningForm("mistral", "[THINK]", "[/THINK]"),
    ReasoningForm("seed_oss", "<seed:think>", "</seed:think>"),
    HARMONY,
)
_NAMED = {form.name: form for form in _FORMS}
assert set(REASONING_PARSERS) == {"auto", "none", *_NAMED}
_FOUND = tuple(form for form in _FORMS if not form.begins_inside)
"""Those that a template shows."""


def is_harmony(source: str) -> bool:
    """Whether a chat template writes messages in channels, as gpt-oss does."""
    return "<|channel|>" in source and "<|message|>" in source


def reasoning_form(source: str, parser: str) -> ReasoningForm | None:
    """The form for `--reasoning-parser`, of which `auto` looks for the marks in a chat template; None: no reasoning."""
    if parser != "auto":
        return _NAMED.get(parser)
    if is_harmony(source):
        return HARMONY
    return next((form for form in _FOUND if form is not HARMONY and form.closing in source), None)


class ReasoningReader:
    """Reads one answer that may begin with reasoning; what follows is left to another reader.

    Spaces around the reasoning are given to nobody.
    """

    def __init__(self, form: ReasoningForm, stage: Stage, rest: AnswerReader) -> None:
        self._form = form
        self._rest = rest
        self._stage: Stage | None = stage
        self._pending = ""
        """What may be the beginning of a mark, and spaces."""
        self._begun = False
        """Whether reasoning was given."""
        self._fed = self._end = 0
        """Characters so far, and those up to the end of the reasoning."""
        self._skips = False
        """Whether spaces stand between the reasoning and the answer."""

    @property
    def calls(self) -> int:
        """See AnswerReader."""
        return self._rest.calls

    @property
    def reasoned(self) -> Sequence[Span]:
        """See AnswerReader."""
        if self._stage is Stage.INSIDE:
            return ((0, None),)
        return ((0, self._end),) if self._end else ()

    def feed(self, text: str) -> list[Piece]:
        """See AnswerReader."""
        if self._stage is None and not self._skips:
            return self._rest.feed(text)
        self._fed += len(text)
        text, self._pending = self._pending + text, ""
        pieces: list[Piece] = []
        if self._stage is Stage.AHEAD:
            text = self._before(text)
        if self._stage is Stage.INSIDE:
            text = self._inside(text, pieces)
            self._end = self._fed - len(text)
        if self._stage is None:
            if self._skips:
                text = text.lstrip()
                self._skips = not text
            pieces += self._rest.feed(text)
        return pieces

    def end(self) -> list[Piece]:
        """See AnswerReader."""
        pending, self._pending = self._pending, ""
        if self._stage is Stage.INSIDE:
            return [*_reasoning(pending.rstrip()), *self._rest.end()]
        return [*self._rest.feed(pending), *self._rest.end()]

    def _before(self, text: str) -> str:
        """What is left of an answer's beginning once it shows whether it is reasoning."""
        begin, opening = space_end(text, 0), self._form.opening
        rest = text[begin : begin + len(opening)]
        if rest == opening:
            self._stage = Stage.INSIDE
            return text[begin + len(opening) :]
        if opening.startswith(rest) and begin <= MAX_SPACE:
            self._pending = text
            return ""
        self._stage = None
        return text

    def _inside(self, text: str, pieces: list[Piece]) -> str:
        """What is left behind the reasoning's end."""
        if not self._begun:
            text = text.lstrip()
        found = text.find(self._form.closing)
        end = found if found >= 0 else len(text) - begun_mark(text, 0, self._form.closing)
        shown = text[:end].rstrip()
        if end - len(shown) > MAX_SPACE:
            shown = text[:end]
        pieces += _reasoning(shown)
        self._begun = self._begun or bool(shown)
        if found < 0:
            self._pending = text[len(shown) :]
            return ""
        self._stage, self._skips = None, True
        return text[found + len(self._form.closing) :]


def _reasoning(text: str) -> Sequence[Piece]:
    return [ReasoningPiece(text)] if text else []


def joined_text(pieces: Sequence[Piece], kind: type[TextPiece] | type[ReasoningPiece]) -> str:
    """The text of all pieces of a kind."""
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))
