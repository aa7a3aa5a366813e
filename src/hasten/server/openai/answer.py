"""The JSON of a whole answer of OpenAI's API: its head, its choices, and the tokens used."""

import time
from dataclasses import dataclass

import msgspec

from hasten.core.errors import HastenError, InvalidRequestError
from hasten.core.types import FinishReason, SamplingParams
from hasten.server.engine.ticket import Progress
from hasten.server.openai.choices import Choice

_encode = msgspec.json.Encoder().encode
_ID_PREFIXES = {"text_completion": "cmpl", "chat.completion": "chatcmpl"}


@dataclass
class Usage:
    """Tokens of one request: of its prompts, and of its completions."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompts_only: bool = False
    """Whether no completion is shown, and so none counts."""

    def count(self, progress: Progress) -> None:
        """Add the tokens of one progress."""
        self.prompt_tokens += len(progress.prompt_token_ids)
        if not self.prompts_only:
            self.completion_tokens += progress.tokens

    def as_json(self) -> dict[str, int]:
        """The object `usage`."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def check_completions(progress: Progress, params: SamplingParams) -> None:
    """HastenError where a completion ended with an error; InvalidRequestError where its own grammar was the reason."""
    for delta in progress.completions:
        if delta.finish_reason is FinishReason.ERROR:
            message = f"the completion could not be continued: {delta.stop_reason}"
            # what ends a constrained completion is its grammar, as good as always
            raise InvalidRequestError(message) if params.is_constrained else HastenError(message)


def answer_head(call: str, kind: str, model: str, unique: str) -> bytes:
    """The JSON of an answer up to its choices.

    `call` is text_completion or chat.completion, `kind` the value of `object`, `unique` the end of `id`.
    """
    head = {"id": f"{_ID_PREFIXES[call]}-{unique}", "object": kind, "created": int(time.time()), "model": model}
    return _encode(head)[:-1] + b',"choices":['


def whole_answer(head: bytes, choices: list[Choice], usage: Usage) -> bytes:
    """The answer of choices, which are used up: to free a million objects takes as long as to make them."""
    choices.sort(key=lambda choice: choice.index, reverse=True)
    parts = []
    while choices:
        parts.append(_encode(choices.pop()))
    return head + b",".join(parts) + b'],"usage":' + _encode(usage.as_json()) + b"}"
