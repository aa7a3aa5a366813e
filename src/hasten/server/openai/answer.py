"""The JSON of an answer of OpenAI's API, whole or as events: its head, its choices, and the tokens used."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from hasten.core.errors import HastenError, InvalidRequestError
from hasten.core.types import FinishReason, SamplingParams
from hasten.server.engine.ticket import Progress, Ticket
from hasten.server.errors import OpenAIErrors
from hasten.server.openai.choices import ChatOutput, ChatPiece, Choice, CompletionChoice, chat_choice, chat_pieces
from hasten.server.openai.handling import error_object
from hasten.server.openai.types import StreamOptions

_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
_ID_PREFIXES = {"text_completion": "cmpl", "chat.completion": "chatcmpl"}


@dataclass
class Usage:
    """Tokens of one request: of its prompts, and of its completions."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None
    """Those of completions that models wrote for themselves; None of answers without reasoning."""
    prompts_only: bool = False
    """Whether no completion is shown, and so none counts."""
    _ended: list[tuple[Ticket, float]] = field(default_factory=list)
    """Each prompt that has ended, and when."""

    def count(self, progress: Progress, ticket: Ticket | None = None) -> None:
        """Add the tokens of one progress of a prompt, which may have ended just now."""
        self.prompt_tokens += len(progress.prompt_token_ids)
        if not self.prompts_only:
            self.completion_tokens += progress.tokens
        if progress.finished and ticket is not None:
            self._ended.append((ticket, time.monotonic()))

    def metrics(self, params: SamplingParams) -> dict[str, float | None] | None:
        """Times of the request, by vLLM's names; None where they are those of several completions."""
        alone = max(params.n, params.beam_width) == 1 and len(self._ended) == 1
        return _times(*self._ended[0]) if alone else None

    def as_json(self) -> dict[str, Any]:
        """The object `usage`."""
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.reasoning_tokens is not None:
            counts["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return counts


def _times(ticket: Ticket, now: float) -> dict[str, float | None]:
    names = ("time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second")
    begun, first = ticket.begun, ticket.first
    if begun is None or first is None:
        return dict.fromkeys(names)
    each = (now - first.at) / (ticket.tokens - 1) if ticket.tokens > 1 else None
    values = (first.at - begun, now - first.at, ticket.queue_seconds, each)
    times = [None if value is None else 1e3 * max(0.0, value) for value in values]
    return dict(zip(names, [*times, ticket.tokens / max(now - begun, 1e-9)], strict=True))


def check_completions(progress: Progress, params: SamplingParams) -> None:
    """HastenError where a completion ended with an error; InvalidRequestError where its own grammar was the reason."""
    for delta in progress.completions:
        if delta.finish_reason is FinishReason.ERROR:
            message = f"the completion could not be continued: {delta.stop_reason}"
            # what ends a constrained completion is its grammar, as good as always
            raise InvalidRequestError(message) if params.is_constrained else HastenError(message)


class AnswerForm(Protocol):
    """How the answer to one request is written. Choices come as they are made; an event is whole with its end."""

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """The answer of all choices, which are used up."""

    def events(self, pieces: Sequence[Choice], usage: Usage) -> bytes:
        """The events of more pieces of choices; the first ones begin the answer."""

    def end(self, usage: Usage) -> bytes:
        """The events behind the last piece."""

    def error(self, error: HastenError) -> bytes:
        """The event of an error that ends the answer."""


class CompletionForm:
    """Answers of completions and chats; see AnswerForm.

    `call` is text_completion or chat.completion, `unique` the end of the answer's id. With `params` the answer has the
    times of the request.
    """

    def __init__(
        self,
        call: str,
        model: str,
        stream: StreamOptions | None = None,
        *,
        params: SamplingParams | None = None,
        unique: str | None = None,
    ) -> None:
        stream = stream or StreamOptions()
        head: dict[str, Any] = {"id": f"{_ID_PREFIXES[call]}-{unique or secrets.token_hex(12)}", "object": call}
        head |= {"created": int(time.time()), "model": model}
        self._head = _encode(head)[:-1] + b',"choices":['
        head["object"] = "text_completion" if call == "text_completion" else "chat.completion.chunk"
        self._begin = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._with_usage = bool(stream.include_usage)
        self._counts_each = self._with_usage and bool(stream.continuous_usage_stats)
        self._end = b'],"usage":null}\n\n' if self._with_usage else b"]}\n\n"
        self._params = params
        self._begun = set[int]()
        """Answers to a chat of which something came."""

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """See AnswerForm; to free a million objects takes as long as to make them."""
        choices.sort(key=lambda choice: choice.index, reverse=True)
        parts = []
        while choices:
            choice = choices.pop()
            parts.append(_encode(chat_choice(choice) if isinstance(choice, ChatOutput) else choice))
        return self._head + b",".join(parts) + b'],"usage":' + _encode(usage.as_json()) + self._metrics(usage) + b"}"

    def events(self, pieces: Sequence[Choice], usage: Usage) -> bytes:
        """See AnswerForm."""
        events, end = b"", self._end
        if self._counts_each:
            end = b'],"usage":' + _encode(usage.as_json()) + b"}\n\n"
        for piece in pieces:
            for shown in self._shown(piece):
                events += self._begin + _encode(shown) + end
        return events

    def end(self, usage: Usage) -> bytes:
        """See AnswerForm."""
        if not self._with_usage:
            return _DONE
        return self._begin + b'],"usage":' + _encode(usage.as_json()) + self._metrics(usage) + b"}\n\n" + _DONE

    def error(self, error: HastenError) -> bytes:
        """See AnswerForm."""
        return b"data: " + _encode(OpenAIErrors(error_object(error)[1])) + b"\n\n"

    def _shown(self, piece: Choice) -> Iterable[CompletionChoice | ChatPiece]:
        if isinstance(piece, CompletionChoice):
            return (piece,)
        if is_first := piece.index not in self._begun:
            self._begun.add(piece.index)
        return chat_pieces(piece, is_first=is_first)

    def _metrics(self, usage: Usage) -> bytes:
        return b"" if self._params is None else b',"metrics":' + _encode(usage.metrics(self._params))
