"""How the answer to a chat is constrained and read: its reasoning, its calls of tools, and its text."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import InvalidRequestError
from hasten.engine.text import Tokenizer
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.tools import ToolUse
from hasten.server.tools.forms import HARMONY_CALLS
from hasten.server.tools.harmony import HarmonyGrammar, HarmonyReader
from hasten.server.tools.reader import AnswerReader, Span, TextReader
from hasten.server.tools.reasoning import HARMONY, ReasoningForm, ReasoningReader, Stage
from hasten.server.tools.rules import Marks, answer_rules

_POSITION = re.compile(r"(?<=: )at \d+\(\d+\): | \d+ \| .*")
"""Where in a grammar an error is."""


class TokenSpans:
    """Which tokens of one answer stand where in its text."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=skip_special_tokens, continues=True)
        self._ends = [0]
        """Characters up to the end of each token, behind those before the first."""

    def add(self, token_ids: Sequence[int]) -> None:
        """Take more tokens of the answer."""
        for token in token_ids:
            self._ends.append(self._ends[-1] + len(self._stream.add(token)))

    def count(self, spans: Sequence[Span]) -> int:
        """Tokens in spans of the text; one that a span ends in belongs to it."""
        return sum(self._count(begin, end) for begin, end in spans)

    def _count(self, begin: int, end: int | None) -> int:
        first = bisect_right(self._ends, begin) if begin else 1  # the first tokens may have no text
        most = len(self._ends) - 1
        last = most if end is None else min(most, bisect_left(self._ends, end))
        return last - first + 1


@dataclass(frozen=True)
class Reasoning:
    """What a model writes for itself before an answer."""

    form: ReasoningForm
    stage: Stage
    """Where it is at the end of the prompt."""
    is_shown: bool = True
    """Whether the answer has it."""


@dataclass(frozen=True)
class AnswerReading:
    """What one answer may be, beside plain text."""

    tokenizer: Tokenizer
    marks: Marks
    tools: ToolUse | None = None
    reasoning: Reasoning | None = None

    @property
    def shows_reasoning(self) -> bool:
        """Whether answers have what the model wrote for itself."""
        return self.reasoning is None or self.reasoning.is_shown

    @property
    def may_reason(self) -> bool:
        """Whether answers may have it, shown or not."""
        return self.reasoning is not None or self._in_channels

    def sampling(self, constraint: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling parameters, in place of what else constrains the answer."""
        kept = constraint if self.tools is None else self.tools.constraint(constraint, self.marks)
        if kept and self.reasoning is not None and not (self._in_channels and self.tools is not None):
            kept = {"grammar": after_reasoning(kept, self.reasoning.form, self.reasoning.stage, self.marks)}
        forms = [each.form for each in (self.tools, self.reasoning) if each is not None]
        is_shown = any(self.marks.any_special(*form.marks) for form in forms)
        return {**kept, "skip_special_tokens": False} if is_shown else dict(kept)

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Errors of the grammar become errors of what the client knows: the tools, or its own constraint."""
        try:
            yield
        except InvalidRequestError as error:
            text = str(error)
            if not text.startswith("grammar ") or (self.tools is None and self.reasoning is None):
                raise
            if self.tools is None:
                raise InvalidRequestError(text.replace("grammar", "the answer's constraint", 1)) from None
            raise OpenAIError(_POSITION.sub("", text).replace("grammar", "tools", 1), param="tools") from None

    def reader(self) -> AnswerReader:
        """What reads one answer."""
        if self._in_channels:
            most = None if self.tools is None else self.tools.max_calls
            return HarmonyReader(with_calls=self.tools is not None, max_calls=most)
        rest: AnswerReader = TextReader() if self.tools is None else self.tools.parser()
        return rest if self.reasoning is None else ReasoningReader(self.reasoning.form, self.reasoning.stage, rest)

    def call_id(self) -> str:
        """An id for a call, of the kind that the model's template takes back."""
        assert self.tools is not None, "nothing else calls"
        return self.tools.call_id()

    @property
    def _in_channels(self) -> bool:
        by_tools = self.tools is not None and self.tools.form is HARMONY_CALLS
        return by_tools or (self.reasoning is not None and self.reasoning.form is HARMONY)


def reading_of(
    tokenizer: Tokenizer, end_tokens: Sequence[int], tools: ToolUse | None, reasoning: Reasoning | None
) -> AnswerReading | None:
    """How an answer is read; None where it is plain text."""
    if tools is None and reasoning is None:
        return None
    return AnswerReading(tokenizer, Marks(tokenizer.added_tokens, end_tokens), tools, reasoning)


def after_reasoning(constraint: Mapping[str, Any], form: ReasoningForm, stage: Stage, marks: Marks) -> str:
    """The grammar of reasoning and an answer that keeps to one constraint under SamplingParams' name."""
    ((kind, value),) = constraint.items()
    rules = answer_rules(kind, value)
    if form is HARMONY:
        return HarmonyGrammar(marks).answer(rules)
    closing = marks.rule(form.closing)
    if form.closing in marks.tokens:
        reasoning = f"reasoning: {marks.text_without(form.closing)} {closing}"
    else:
        reasoning = f"reasoning[lazy]: /(?s:.*)/ {closing}"
    begin = f"({marks.rule(form.opening)} reasoning GAP?)?" if stage is Stage.AHEAD else "reasoning GAP?"
    return "\n".join([f"start: {begin} answer", rules, reasoning, r"GAP: /[ \n]{1,4}/"])
