"""What a model writes for itself before it answers: its marks, whether a prompt has begun it, and its reader."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hasten.core.config import REASONING_PARSERS
from hasten.server.tools.reader import (
    MAX_SPACE,
    SPACE,
    AnswerReader,
    BrokenOffError,
    Piece,
    Reading,
    ReasoningPiece,
    TextPiece,
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

    @property
    def marks(self) -> tuple[str, ...]:
        """Marks that an answer's text has to have for its reader."""
        return self.opening, self.closing

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


class ReasoningReader(AnswerReader):
    """Reads one answer that may begin with reasoning; what follows is left to another reader.

    Spaces around the reasoning are given to nobody.
    """

    def __init__(self, form: ReasoningForm, stage: Stage, rest: AnswerReader) -> None:
        super().__init__()
        self._form = form
        self._rest_reader = rest
        self._is_ahead = stage is Stage.AHEAD
        self.reasoned = [] if self._is_ahead else [(0, None)]
        self._begun = False
        """Whether reasoning was given."""
        self._trailing = ""
        """Spaces behind it."""

    def end(self) -> list[Piece]:
        """See AnswerReader."""
        return [*super().end(), *self._rest_reader.end()]

    def _read(self) -> Reading[None]:
        if self._is_ahead:
            self._is_ahead = False
            self._hold()
            yield from self._skip(SPACE)
            if not (yield from self._sees(self._form.opening)):
                raise BrokenOffError
            self._held, self.reasoned = None, [(0, None)]
            self._at += len(self._form.opening)
        if self.reasoned == [(0, None)] and (yield from self._until(self._put_reasoning, self._form.closing)):
            self._at += len(self._form.closing)
            self.reasoned = [(0, self._position)]
            yield from self._skip(SPACE)
        self._put_text((yield from self._rest()))

    def _put_reasoning(self, text: str) -> None:
        text = self._trailing + text if self._begun else text.lstrip()
        shown = text.rstrip()
        if len(text) - len(shown) > MAX_SPACE:
            shown = text
        self._trailing = text[len(shown) :]
        if shown:
            self._begun = True
            self._pieces.append(ReasoningPiece(shown))

    def _put_text(self, text: str) -> None:
        self._pieces += self._rest_reader.feed(text)
        self.calls = self._rest_reader.calls


def joined_text(pieces: Sequence[Piece], kind: type[TextPiece] | type[ReasoningPiece]) -> str:
    """The text of all pieces of a kind."""
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))
