"""Requests and events of the APIs over HTTP: OpenAI's completions and chats, Triton's generate extension."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from hasten.bench.load.reply import Event, RequestError
from hasten.bench.load.triton import TextModelInputs

Exchanged = Sequence[tuple[str, str]]
"""What was said before in a conversation: prompts with their answers."""
_DONE = b"[DONE]"


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What all requests of a load have."""

    model: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters under SamplingParams' names."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the body, which replace those of the same name; None removes one."""


class Codec(Protocol):
    """The form that one API gives to requests and events."""

    path: str
    """Where requests are posted."""

    def body(self, prompt: str | list[int], output_length: int, before: Exchanged) -> bytes:
        """A request's body."""

    def event(self, data: bytes) -> Event:
        """What an event says; RequestError where it is an error."""


def full_prompt(prompt: str | list[int], before: Exchanged) -> str | list[int]:
    """A prompt behind what was said before, for APIs that know no messages."""
    if not before:
        return prompt
    return "".join(f"{said}{answer}\n" for said, answer in before) + str(prompt)


def with_extra(body: dict[str, Any], extra: Mapping[str, Any]) -> bytes:
    """A body as JSON, with the user's own fields."""
    return json.dumps({name: value for name, value in {**body, **extra}.items() if value is not None}).encode()


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk).decode


class _OpenAI:
    """What completions and chats have in common."""

    def __init__(self, options: RequestOptions) -> None:
        self._fixed = {
            "model": options.model,
            **options.sampling,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._extra = options.extra

    def event(self, data: bytes) -> Event:
        """See Codec."""
        if data == _DONE:
            return Event()
        try:
            chunk = _chunk(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError("invalid event", f"an event is not of OpenAI's form: {error}: {data[:80]!r}") from None
        if chunk.error is not None:
            raise RequestError("error in the stream", _message(chunk.error))
        usage = chunk.usage or _Usage()
        text = "".join(map(_text, chunk.choices))
        return Event(bool(chunk.choices), text, usage.prompt_tokens, usage.completion_tokens)


def _text(choice: _Choice) -> str:
    if choice.delta is None:
        return choice.text or ""
    delta = choice.delta
    return (delta.content or "") + (delta.reasoning_content or delta.reasoning or "")


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


class Completions(_OpenAI):
    """OpenAI's completions; prompts may be token ids."""

    path = "/v1/completions"

    def body(self, prompt: str | list[int], output_length: int, before: Exchanged) -> bytes:
        """See Codec."""
        named = {"prompt": full_prompt(prompt, before), "max_tokens": output_length}
        return with_extra(self._fixed | named, self._extra)


class Chats(_OpenAI):
    """OpenAI's chats; a conversation's turns are its messages."""

    path = "/v1/chat/completions"

    def __init__(self, options: RequestOptions) -> None:
        super().__init__(options)
        logprobs = self._fixed.pop("logprobs", None)
        if logprobs is not None:
            self._fixed |= {"logprobs": True, "top_logprobs": logprobs}

    def body(self, prompt: str | list[int], output_length: int, before: Exchanged) -> bytes:
        """See Codec."""
        messages = [
            {"role": role, "content": text}
            for said, answer in before
            for role, text in (("user", said), ("assistant", answer))
        ]
        messages.append({"role": "user", "content": str(prompt)})
        named = {"messages": messages, "max_completion_tokens": output_length}
        return with_extra(self._fixed | named, self._extra)


class _Generated(msgspec.Struct):
    text_output: str | list[str] | None = None
    num_input_tokens: int | list[int] | None = None
    num_output_tokens: int | list[int] | None = None
    error: Any = None


_generated = msgspec.json.Decoder(_Generated).decode


class Generate:
    """Triton's generate extension, as server-sent events."""

    def __init__(self, options: RequestOptions, inputs: TextModelInputs) -> None:
        self.path = f"/v2/models/{options.model}/generate_stream"
        self._inputs = inputs
        self._extra = options.extra

    def body(self, prompt: str | list[int], output_length: int, before: Exchanged) -> bytes:
        """See Codec."""
        return with_extra(self._inputs.values(str(full_prompt(prompt, before)), output_length), self._extra)

    def event(self, data: bytes) -> Event:
        """See Codec."""
        try:
            generated = _generated(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError("invalid event", f"an event is not of Triton's form: {error}: {data[:80]!r}") from None
        if generated.error is not None:
            raise RequestError("error in the stream", str(generated.error))
        output = generated.text_output
        text = output if isinstance(output, str) else "".join(output or ())
        return Event(
            output is not None, text, _sum(generated.num_input_tokens), None, _sum(generated.num_output_tokens) or 0
        )


def _sum(counts: int | list[int] | None) -> int | None:
    return sum(counts) if isinstance(counts, list) else counts
