"""What OpenAI's API answers: choices, whole or piece by piece, in the form of completions or of chats."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from hasten.core.types import SamplingParams
from hasten.engine.text import Tokenizer
from hasten.server.engine.ticket import Progress
from hasten.server.engine.wire import CompletionDelta, Logprob
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.types import CompletionRequest

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; as OpenAI writes it."""


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


class ChatMessageOut(msgspec.Struct, omit_defaults=True):
    """An answer, or what is new of it."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct):
    """A whole answer."""

    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatPiece(msgspec.Struct):
    """A piece of an answer."""

    index: int
    delta: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: str | None


Choice = CompletionChoice | ChatChoice | ChatPiece


class Choices(Protocol):
    """Makes choices of what the engine says. `number` counts the request's prompts, `progress` is about one of them."""

    def take(self, number: int, progress: Progress) -> Sequence[Choice]:
        """The choices, or pieces of choices, in one progress."""


def _reason(delta: CompletionDelta) -> str | None:
    return None if delta.finish_reason is None else delta.finish_reason.value


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST_LOGPROB)


@dataclass
class CompletionChoices:
    """Completions: with `echo`, each begins with its prompt. Choices are numbered through all prompts."""

    n: int
    echo: bool = False
    prompts_only: bool = False
    """Show no token behind the prompt: `max_tokens` was 0."""
    tokenizer: Tokenizer | None = None
    texts: Sequence[str | None] = ()
    """Prompts that were given as texts; others are decoded."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Choice -> characters of its text so far."""
    _first: dict[int, Progress] = field(default_factory=dict)
    """Prompt -> its first progress, which has the prompt's log-probabilities."""

    def take(self, number: int, progress: Progress) -> list[CompletionChoice]:
        """See Choices."""
        if self.echo:
            self._first.setdefault(number, progress)
        return [self._choice(number, delta) for delta in progress.completions]

    def _choice(self, number: int, delta: CompletionDelta) -> CompletionChoice:
        index = number * self.n + delta.index
        if delta.logprobs is None and not self.echo:
            return CompletionChoice(index, delta.text, None, _reason(delta))
        tokens = [] if self.prompts_only else delta.token_ids
        text = "" if self.prompts_only else delta.text
        entries: list[dict[int, Logprob] | None] | None = None
        if delta.logprobs is not None:
            entries = [] if self.prompts_only else list(delta.logprobs)
        if self.echo and index not in self._offsets:
            first = self._first[number]
            text = self._prompt_text(number, first) + text
            tokens = [*first.prompt_token_ids, *tokens]
            if entries is not None:
                entries = [*(first.prompt_logprobs or ()), *entries]
        made = None if entries is None else self._logprobs(index, tokens, entries)
        if made is None:
            self._offsets[index] = 0
        reason = "length" if self.prompts_only and delta.finish_reason is not None else _reason(delta)
        return CompletionChoice(index, text, made, reason)

    def _prompt_text(self, number: int, first: Progress) -> str:
        text = self.texts[number]
        if text is None:
            assert self.tokenizer is not None
            text = self.tokenizer.decode(first.prompt_token_ids, skip_special_tokens=False)
        return text

    def _logprobs(
        self, index: int, tokens: Sequence[int], entries: Sequence[dict[int, Logprob] | None]
    ) -> CompletionLogprobs:
        made = CompletionLogprobs([], [], [], [])
        offset = self._offsets.get(index, 0)
        for token, top in zip(tokens, entries, strict=True):
            text = self._text(token, top)
            made.tokens.append(text)
            made.text_offset.append(offset)
            made.token_logprobs.append(None if top is None else _value(top[token]))
            made.top_logprobs.append(None if top is None else _by_text(top))
            offset += len(text)
        self._offsets[index] = offset
        return made

    def _text(self, token: int, top: dict[int, Logprob] | None) -> str:
        if top is not None:
            return _token_text(token, top[token])
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode([token], skip_special_tokens=False, continues=True)


@dataclass
class BestChoices:
    """The best of more completions than are shown: those whose tokens were the most probable on the average."""

    choices: CompletionChoices
    with_logprobs: bool

    def take(self, number: int, progress: Progress) -> list[CompletionChoice]:
        """See Choices; all completions of a prompt come in one progress."""
        progress.completions = sorted(progress.completions, key=_mean_logprob, reverse=True)[: self.choices.n]
        for index, delta in enumerate(progress.completions):
            delta.index = index
            if not self.with_logprobs:
                delta.logprobs = None
        return self.choices.take(number, progress)


def completion_choices(
    asked: CompletionRequest, prompts: Sequence[str | list[int]], params: SamplingParams, tokenizer: Tokenizer | None
) -> Choices:
    """The form of the answer to POST /v1/completions; OpenAIError where it needs a tokenizer and there is none."""
    if asked.echo and tokenizer is None:
        raise OpenAIError("echo needs a tokenizer, and the model has none", param="echo")
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    shown = 1 if asked.n is None else asked.n
    choices = CompletionChoices(shown, bool(asked.echo), asked.shows_prompts_only, tokenizer, texts)
    return choices if params.n == shown else BestChoices(choices, with_logprobs=asked.logprobs is not None)


def _mean_logprob(delta: CompletionDelta) -> float:
    return (delta.cumulative_logprob or 0.0) / max(1, len(delta.token_ids))


def _token_text(token: int, entry: Logprob) -> str:
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def _by_text(top: dict[int, Logprob]) -> dict[str, float]:
    """The most probable of those tokens that have the same text."""
    made: dict[str, float] = {}
    for token, entry in sorted(top.items(), key=lambda item: -item[1].logprob):
        made.setdefault(_token_text(token, entry), _value(entry))
    return made


@dataclass
class ChatChoices:
    """Answers of a chat."""

    stream: bool
    top_logprobs: int = 0
    _begun: set[int] = field(default_factory=set)

    def take(self, number: int, progress: Progress) -> list[ChatChoice | ChatPiece]:
        """See Choices; a chat has one prompt."""
        return [self._choice(delta) for delta in progress.completions]

    def _choice(self, delta: CompletionDelta) -> ChatChoice | ChatPiece:
        logprobs = None if delta.logprobs is None else self._logprobs(delta)
        if not self.stream:
            return ChatChoice(delta.index, ChatMessageOut("assistant", delta.text), logprobs, _reason(delta))
        role = None if delta.index in self._begun else "assistant"
        self._begun.add(delta.index)
        return ChatPiece(delta.index, ChatMessageOut(role, delta.text), logprobs, _reason(delta))

    def _logprobs(self, delta: CompletionDelta) -> ChatLogprobs:
        pairs = zip(delta.token_ids, delta.logprobs or (), strict=True)
        return ChatLogprobs([self._token(token, top) for token, top in pairs])

    def _token(self, token: int, top: dict[int, Logprob]) -> ChatToken:
        listed = sorted((entry.rank, other, entry) for other, entry in top.items() if entry.rank <= self.top_logprobs)
        chosen = _token_logprob(token, top[token])
        others = [_token_logprob(other, entry) for _, other, entry in listed[: self.top_logprobs]]
        return ChatToken(chosen.token, chosen.logprob, chosen.bytes, others)


def _token_logprob(token: int, entry: Logprob) -> TokenLogprob:
    text = _token_text(token, entry)
    return TokenLogprob(text, _value(entry), list(text.encode()))
