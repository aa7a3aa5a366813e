"""Requests of OpenAI's Responses API: its stateless part. A field that is not here is refused by its name."""

from typing import Any, Literal

import msgspec
from msgspec import Raw

from hasten.server.openai.types import ContentPart, FieldsWithoutEffect, JsonSchema, ResponseFormat, StreamOptions, Tool

LOGPROBS = "message.output_text.logprobs"


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What the answer's text keeps to."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema: Raw = msgspec.field(default_factory=Raw)

    def shown(self) -> dict[str, Any]:
        """What an answer says of it."""
        given = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in given.items() if value is not None and value != Raw()}

    def as_chat(self) -> ResponseFormat:
        """The same as a chat has it."""
        schema = JsonSchema(self.name, self.description, self.strict, self.schema)
        return ResponseFormat(self.type, schema if self.type == "json_schema" else None)


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How the answer's text is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class InputItem(msgspec.Struct):
    """A message, a call or its result; `type` says which, and what else it has does not matter."""

    type: str | None = None
    """message (the default), reasoning, function_call or function_call_output."""
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ResponsesRequest(FieldsWithoutEffect, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/responses; `null` stands for a field that is left out."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None

    include: list[str] | None = None
    """message.output_text.logprobs alone."""
    top_logprobs: int | None = None
    reasoning: dict[str, Any] | None = None
    """`effort` alone, for templates that know it."""

    # Refused unless they ask for nothing: no answer is kept, and no model here looks things up.
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    truncation: str | None = None
    max_tool_calls: int | None = None
    prompt: Any = None
    service_tier: str | None = None

    # vLLM's extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    """As in chats."""
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer's text has the log-probabilities of its tokens."""
        return self.include is not None and LOGPROBS in self.include

    def chat_tools(self) -> list[Tool] | None:
        """The tools as a chat has them."""
        if self.tools is None:
            return None
        return [msgspec.convert({"type": "function", "function": _function(tool)}, Tool) for tool in self.tools]


def _function(tool: ResponseTool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
