"""Requests of OpenAI's API as they come in, with vLLM's extensions. A field that is not here is refused by its name."""

from typing import Any, Literal

import msgspec
from msgspec import Raw

from hasten.core.errors import InvalidRequestError


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: each event has the usage so far, as vLLM's have."""
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """A schema with its name, which has no effect."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Whether or not, the output keeps to the schema."""
    schema: Raw = msgspec.field(default_factory=Raw)


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's way to constrain the output."""

    type: str
    """text, json_object or json_schema."""
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's way to constrain the output: one of these."""

    json: Raw = msgspec.field(default_factory=Raw)
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class SharedFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What requests of all APIs that generate text have in common; `null` stands for a field that is left out."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None

    # vLLM's extensions
    top_k: int | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    """As everywhere in this server: 1 is the highest, larger ones come later, 0 is the default, between 1 and 2."""
    cache_salt: str | None = None
    """The prefix cache's blocks of its prompts are shared with requests of the same salt, and API key, alone."""


class FieldsWithoutEffect(SharedFields, kw_only=True):
    """What requests may say without effect: nothing here depends on who sends them, and no prompt is kept."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None


class GenerationRequest(FieldsWithoutEffect, kw_only=True):
    """What completions and chats have in common."""

    max_tokens: int | None = None
    n: int | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    response_format: ResponseFormat | None = None

    # vLLM's extensions
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    stop_words_ids: list[list[int]] | None = None
    bad_words: list[str] | None = None
    bad_words_ids: list[list[int]] | None = None
    allowed_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    use_beam_search: bool | None = None
    best_of: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    beam_search_diversity_rate: float | None = None
    guided_json: Raw = msgspec.field(default_factory=Raw)
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None


Prompts = str | list[str | int | list[int]]
"""A text, several texts, token ids, or several lists of token ids."""


def each_prompt(name: str, given: Prompts) -> list[str | list[int]]:
    """Each text, or its token ids; InvalidRequestError where they are mixed up, or there is none."""
    if isinstance(given, str):
        return [given]
    kinds = set(map(type, given))
    if kinds == {int}:
        return [given]  # type: ignore[list-item]  # all of them are int
    if kinds in ({str}, {list}):
        return list(given)  # type: ignore[arg-type]  # none of them is int
    raise InvalidRequestError(
        f"{name} is empty" if not kinds else f"{name} mixes texts, token ids and lists of token ids"
    )


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    @property
    def shows_prompts_only(self) -> bool:
        """Whether prompts are to be given back and nothing is to follow them."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """Each prompt; InvalidRequestError where texts and token ids are mixed up or there is none."""
        return each_prompt("prompt", self.prompt)


class ContentPart(msgspec.Struct):
    """A part of a message; only texts can be read, so what else a part has does not matter."""

    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A function that was called."""

    name: str
    arguments: str | dict[str, Any] | None = None
    """A JSON object, as its text or as itself."""


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A call in a message of the assistant."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    """Without effect: pieces of streams have it."""


class Function(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the object that its arguments are; without one it has none."""
    strict: bool | None = None
    """Whether calls that the model chooses to write keep to the schema; calls that it must write always do."""


class Tool(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    """A function by its name."""

    name: str


class NamedToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The function that must be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a chat, with all that OpenAI's own answers have in them."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """What the assistant wrote for itself, under either name."""
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """For templates that know it."""
    modalities: list[str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    # vLLM's extensions
    include_reasoning: bool | None = None
    """Whether answers have what the model writes for itself; they do."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
