"""What OpenAI's API answers: choices, whole or piece by piece, in the form of completions or of chats."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

from hasten.core.types import FinishReason, SamplingParams
from hasten.engine.text import Tokenizer
from hasten.server.engine.ticket import Progress
from hasten.server.engine.wire import CompletionDelta, Logprob
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading, TokenSpans
from hasten.server.openai.types import CompletionRequest
from hasten.server.tools.reader import AnswerReader, CallPiece, Piece, ReasoningPiece, TextPiece
from hasten.server.tools.reasoning import joined_text

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; as OpenAI writes it."""


StopReason = int | str | msgspec.UnsetType
"""The stop token or stop string that ended a completion, where one did; vLLM's field."""


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion's tokens, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token begins in the choice's text."""


class CompletionChoice(msgspec.Struct):
    """A completion or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: StopReason = msgspec.UNSET


class TokenLogprob(msgspec.Struct):
    """A token that was possible."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TokenLogprob):
    """A token of a chat's answer, with the most probable ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat's answer."""

    content: list[ChatToken]
    refusal: None = None


class FunctionOut(msgspec.Struct, omit_defaults=True):
    """A call's function, or what is new of its arguments' JSON."""

    arguments: str
    name: str | None = None


class ToolCallOut(msgspec.Struct, omit_defaults=True):
    """A call, or what is new of it: its first piece has all but the arguments, the others have those alone."""

    function: FunctionOut
    index: int | None = None
    """Which call it is a piece of."""
    id: str | None = None
    type: str | None = None


class ChatMessageOut(msgspec.Struct, omit_defaults=True):
    """An answer, or what is new of it."""

    role: str | None = None
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning: str | None = None
    """What the model wrote for itself."""
    reasoning_content: str | None = None
    """The same, under the name that most clients know."""
    tool_calls: list[ToolCallOut] | None = None


class ChatChoice(msgspec.Struct):
    """A whole answer."""

    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: StopReason = msgspec.UNSET


class ChatPiece(msgspec.Struct):
    """A piece of an answer."""

    index: int
    delta: ChatMessageOut
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: StopReason = msgspec.UNSET


class ChatOutput(msgspec.Struct):
    """An answer to a chat, or what is new of it, for the forms of all APIs."""

    index: int
    parts: Sequence[Piece]
    """Text, reasoning and calls, in the order in which the model wrote them."""
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: StopReason = msgspec.UNSET

    @property
    def tokens(self) -> Sequence[ChatToken]:
        """Those of the text, where their log-probabilities are wanted."""
        return () if self.logprobs is None else self.logprobs.content


Choice = CompletionChoice | ChatOutput


def _shows(delta: CompletionDelta) -> bool:
    """Whether there is anything to see: a token may be the beginning of a character, or of a stop string."""
    return bool(delta.text or delta.logprobs) or delta.finish_reason is not None


def _reason(delta: CompletionDelta) -> str | None:
    return None if delta.finish_reason is None else delta.finish_reason.value


def _stop_reason(delta: CompletionDelta) -> StopReason:
    found = delta.finish_reason is FinishReason.STOP and delta.stop_reason is not None
    return delta.stop_reason if found else msgspec.UNSET  # type: ignore[return-value]  # not None


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST_LOGPROB)


@dataclass
class CompletionChoices:
    """Makes completions of what the engine says: with `echo`, each begins with its prompt.

    They are numbered through all prompts.
    """

    reasoning_tokens: ClassVar[None] = None
    n: int
    echo: bool = False
    prompts_only: bool = False
    """Show no token behind the prompt: `max_tokens` was 0."""
    tokenizer: Tokenizer | None = None
    texts: Sequence[str | None] = ()
    """Prompts that were given as texts; others are decoded."""
    best_only: bool = False
    """Whether more completions come, all at once, than the `n` whose tokens are the most probable on the average."""
    with_logprobs: bool = True
    """Whether those are shown that the best are found by."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Choice -> characters of its text so far."""
    _first: dict[int, Progress] = field(default_factory=dict)
    """Prompt -> its first progress, which has the prompt's log-probabilities."""

    def take(self, number: int, progress: Progress) -> list[CompletionChoice]:
        """The choices, or pieces of choices, in a progress of a prompt of this number."""
        if self.echo:
            self._first.setdefault(number, progress)
        if self.best_only:
            progress.completions = sorted(progress.completions, key=_mean_logprob, reverse=True)[: self.n]
            for index, delta in enumerate(progress.completions):
                delta.index, delta.logprobs = index, delta.logprobs if self.with_logprobs else None
        if self.prompts_only:
            for delta in progress.completions:
                _leave_out_tokens(delta)
        return [self._choice(number, delta) for delta in progress.completions if _shows(delta)]

    def _choice(self, number: int, delta: CompletionDelta) -> CompletionChoice:
        index, text, tokens = number * self.n + delta.index, delta.text, delta.token_ids
        entries: Sequence[dict[int, Logprob] | None] | None = delta.logprobs
        if self.echo and index not in self._offsets:
            first, self._offsets[index] = self._first[number], 0
            text = self._prompt_text(number, first) + text
            if entries is not None:
                tokens, entries = [*first.prompt_token_ids, *tokens], [*(first.prompt_logprobs or ()), *entries]
        logprobs = None if entries is None else self._logprobs(index, tokens, entries)
        if delta.finish_reason is None:
            return CompletionChoice(index, text, logprobs, None)
        return CompletionChoice(index, text, logprobs, _reason(delta), _stop_reason(delta))

    def _prompt_text(self, number: int, first: Progress) -> str:
        text = self.texts[number]
        if text is None:
            assert self.tokenizer is not None
            text = self.tokenizer.decode(first.prompt_token_ids, skip_special_tokens=False)
        return text

    def _logprobs(
        self, index: int, tokens: Sequence[int], entries: Sequence[dict[int, Logprob] | None]
    ) -> CompletionLogprobs:
        result = CompletionLogprobs([], [], [], [])
        offset = self._offsets.get(index, 0)
        for token, top in zip(tokens, entries, strict=True):
            text = self._text(token, top)
            result.tokens.append(text)
            result.text_offset.append(offset)
            result.token_logprobs.append(None if top is None else _value(top[token]))
            result.top_logprobs.append(None if top is None else _by_text(top))
            offset += len(text)
        self._offsets[index] = offset
        return result

    def _text(self, token: int, top: dict[int, Logprob] | None) -> str:
        if top is not None:
            return _token_text(token, top[token])
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode([token], skip_special_tokens=False, continues=True)


def _leave_out_tokens(delta: CompletionDelta) -> None:
    delta.token_ids, delta.text, delta.logprobs = [], "", None if delta.logprobs is None else []
    if delta.finish_reason is not None:
        delta.finish_reason = FinishReason.LENGTH


def completion_choices(
    body: CompletionRequest, prompts: Sequence[str | list[int]], params: SamplingParams, tokenizer: Tokenizer | None
) -> CompletionChoices:
    """Those of POST /v1/completions; OpenAIError where they need a tokenizer and there is none."""
    if body.echo and tokenizer is None:
        raise OpenAIError("echo needs a tokenizer, and the model has none", param="echo")
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    shown = 1 if body.n is None else body.n
    return CompletionChoices(
        shown,
        bool(body.echo),
        body.shows_prompts_only,
        tokenizer,
        texts,
        best_only=params.n != shown,
        with_logprobs=body.logprobs is not None,
    )


def _mean_logprob(delta: CompletionDelta) -> float:
    return (delta.cumulative_logprob or 0.0) / max(1, len(delta.token_ids))


def _token_text(token: int, entry: Logprob) -> str:
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def _by_text(top: dict[int, Logprob]) -> dict[str, float]:
    """The most probable of those tokens that have the same text."""
    values: dict[str, float] = {}
    for token, entry in sorted(top.items(), key=lambda item: -item[1].logprob):
        values.setdefault(_token_text(token, entry), _value(entry))
    return values


@dataclass
class ChatChoices:
    """Makes answers of a chat of what the engine says: `reading` says how reasoning and calls are read in them."""

    top_logprobs: int = 0
    reading: AnswerReading | None = None
    skip_special_tokens: bool = True
    """Whether the text is without them."""
    _readers: dict[int, AnswerReader] = field(default_factory=dict)
    _spans: dict[int, TokenSpans] = field(default_factory=dict)
    """Where the tokens of answers with reasoning stand in their texts."""

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens so far that models wrote for themselves; None of answers without reasoning."""
        if self.reading is None or not self.reading.may_reason:
            return None
        return sum(spans.count(self._readers[index].reasoned) for index, spans in self._spans.items())

    def take(self, number: int, progress: Progress) -> list[ChatOutput]:
        """The answers, or what is new of them, in a progress; a chat has one prompt."""
        outputs = []
        for delta in progress.completions:
            output = self._output(delta)
            if output.parts or output.finish_reason is not None or output.tokens:
                outputs.append(output)
        return outputs

    def _output(self, delta: CompletionDelta) -> ChatOutput:
        if self.reading is None:
            parts: Sequence[Piece] = (TextPiece(delta.text),) if _shows(delta) else ()
        else:
            parts = self._read(self.reading, delta)
        output = ChatOutput(delta.index, parts)
        if delta.logprobs is not None:
            output.logprobs = self._logprobs(delta)
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = self._reason(delta), _stop_reason(delta)
        return output

    def _read(self, reading: AnswerReading, delta: CompletionDelta) -> list[Piece]:
        reader = self._readers.get(delta.index)
        if reader is None:
            reader = self._readers[delta.index] = reading.reader()
            if reading.may_reason:
                skips = self.skip_special_tokens
                self._spans[delta.index] = TokenSpans(reading.tokenizer, skip_special_tokens=skips)
        if (spans := self._spans.get(delta.index)) is not None:
            spans.add(delta.token_ids)
        pieces = reader.feed(delta.text)
        pieces = pieces if delta.finish_reason is None else pieces + reader.end()
        for piece in pieces:
            if isinstance(piece, CallPiece) and piece.name is not None:
                piece.id = reading.call_id()
        if reading.shows_reasoning:
            return pieces
        return [piece for piece in pieces if not isinstance(piece, ReasoningPiece)]

    def _reason(self, delta: CompletionDelta) -> str | None:
        reader = self._readers.get(delta.index)
        called = reader is not None and reader.calls > 0 and delta.finish_reason is FinishReason.STOP
        return "tool_calls" if called else _reason(delta)

    def _logprobs(self, delta: CompletionDelta) -> ChatLogprobs:
        pairs = zip(delta.token_ids, delta.logprobs or (), strict=True)
        return ChatLogprobs([self._token(token, top) for token, top in pairs])

    def _token(self, token: int, top: dict[int, Logprob]) -> ChatToken:
        listed = sorted((entry.rank, other, entry) for other, entry in top.items() if entry.rank <= self.top_logprobs)
        chosen = _token_logprob(token, top[token])
        others = [_token_logprob(other, entry) for _, other, entry in listed[: self.top_logprobs]]
        return ChatToken(chosen.token, chosen.logprob, chosen.bytes, others)


Choices = CompletionChoices | ChatChoices


def chat_choice(output: ChatOutput) -> ChatChoice:
    """A whole answer."""
    parts, calls = output.parts, list[tuple[CallPiece, list[str]]]()
    for part in parts:
        if isinstance(part, CallPiece):
            if part.name is not None:
                calls.append((part, []))
            calls[-1][1].append(part.arguments)
    text, reasoning = joined_text(parts, TextPiece), joined_text(parts, ReasoningPiece) or None
    written = [
        ToolCallOut(FunctionOut("".join(arguments), call.name), id=call.id, type="function")
        for call, arguments in calls
    ]
    content = text if text or not (written or reasoning) else None
    message = ChatMessageOut("assistant", content, reasoning, reasoning, written or None)
    return ChatChoice(output.index, message, output.logprobs, output.finish_reason, output.stop_reason)


def chat_pieces(output: ChatOutput, *, is_first: bool) -> list[ChatPiece]:
    """What is new of an answer: one piece for each part of it; `is_first`: nothing of it came before."""
    pieces = [ChatPiece(output.index, message) for message in map(_message, output.parts)]
    if not pieces:
        pieces = [ChatPiece(output.index, ChatMessageOut())]
    pieces[0].logprobs = output.logprobs
    pieces[-1].finish_reason, pieces[-1].stop_reason = output.finish_reason, output.stop_reason
    if is_first:
        pieces[0].delta.role = "assistant"
    return pieces


def _message(part: Piece) -> ChatMessageOut:
    if isinstance(part, TextPiece):
        return ChatMessageOut(content=part.text)
    if isinstance(part, ReasoningPiece):
        return ChatMessageOut(reasoning=part.text, reasoning_content=part.text)
    head = {} if part.name is None else {"id": part.id, "type": "function"}
    return ChatMessageOut(tool_calls=[ToolCallOut(FunctionOut(part.arguments, part.name), part.number, **head)])


def _token_logprob(token: int, entry: Logprob) -> TokenLogprob:
    text = _token_text(token, entry)
    return TokenLogprob(text, _value(entry), list(text.encode()))
