"""Requests of OpenAI's Responses API, its stateless part, and the chats that they are. Others are refused by name."""

from typing import Any, Literal

import msgspec
from msgspec import Raw

from hasten.server.openai.params import OpenAIError, text_parts
from hasten.server.openai.types import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    FieldsWithoutEffect,
    Function,
    FunctionCall,
    FunctionName,
    JsonSchema,
    NamedToolChoice,
    ResponseFormat,
    SharedFields,
    StreamOptions,
    Tool,
    ToolCall,
)

LOGPROBS = "message.output_text.logprobs"


class TextFormat(JsonSchema, kw_only=True):
    """What the answer's text keeps to."""

    type: Literal["text", "json_object", "json_schema"]

    def shown(self) -> dict[str, Any]:
        """What an answer says of it."""
        given = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in given.items() if value is not None and value != Raw()}


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How the answer's text is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseTool(Function, kw_only=True, omit_defaults=False):
    """A function that the model may call."""

    type: Literal["function"]


class ResponseToolChoice(FunctionName, kw_only=True):
    """The function that must be called."""

    type: Literal["function"]


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


class ResponsesRequest(FieldsWithoutEffect, kw_only=True):
    """POST /v1/responses; `null` stands for a field that is left out."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
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
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer's text has the log-probabilities of its tokens."""
        return self.include is not None and LOGPROBS in self.include


_MAX_ITEMS = 4096
_TEXTS = ("input_text", "output_text", "text")
_OWN = ("parallel_tool_calls", "min_p", "repetition_penalty", "stop", "chat_template_kwargs")
_SAME = (*SharedFields.__struct_fields__, *_OWN)
"""Fields that chats have, too."""


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The chat that a request asks for; OpenAIError names what no model here can do."""
    _check(body)
    kept = None if body.text is None else body.text.format
    choice = body.tool_choice
    return ChatRequest(
        **{name: getattr(body, name) for name in _SAME},
        messages=_messages(body),
        max_completion_tokens=body.max_output_tokens,
        response_format=None if kept is None else ResponseFormat(kept.type, kept),
        tools=None if body.tools is None else [Tool("function", tool) for tool in body.tools],
        tool_choice=NamedToolChoice(choice) if isinstance(choice, ResponseToolChoice) else choice,
        logprobs=body.with_logprobs or None,
        top_logprobs=body.top_logprobs,
        reasoning_effort=(body.reasoning or {}).get("effort"),
    )


def _check(body: ResponsesRequest) -> None:
    unsupported = {
        "store": bool(body.store),
        "previous_response_id": body.previous_response_id is not None,
        "conversation": body.conversation is not None,
        "background": bool(body.background),
        "include": any(name != LOGPROBS for name in body.include or ()),
        "reasoning": any(value is not None for name, value in (body.reasoning or {}).items() if name != "effort"),
        "truncation": body.truncation not in (None, "disabled"),
        "max_tool_calls": body.max_tool_calls is not None,
        "prompt": body.prompt is not None,
        "service_tier": body.service_tier not in (None, "auto", "default"),
        "text": body.text is not None and body.text.verbosity not in (None, "medium"),
        "stream_options": body.stream_options is not None
        and bool(body.stream_options.include_obfuscation or body.stream_options.include_usage),
    }
    for name, is_given in unsupported.items():
        if is_given:
            message = f"{name} is not supported: answers are not kept, and have text and calls of functions alone"
            raise OpenAIError(f"{message}; leave it out", param=name)
    if body.top_logprobs and not body.with_logprobs:
        raise OpenAIError(f"top_logprobs needs include to have {LOGPROBS}", param="top_logprobs")
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise OpenAIError(f"reasoning.effort must be a string, got {effort!r:.80}", param="reasoning")
    if isinstance(body.input, list) and len(body.input) > _MAX_ITEMS:
        raise OpenAIError(f"input is limited to {_MAX_ITEMS} items, got {len(body.input)}", param="input")


def _messages(body: ResponsesRequest) -> list[ChatMessage]:
    messages = [] if body.instructions is None else [ChatMessage(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*messages, ChatMessage(role="user", content=body.input)]
    for number, item in enumerate(body.input):
        message = _message(f"input[{number}]", item)
        if messages and message.role == "assistant" and _goes_on(messages[-1], message):
            _join(messages[-1], message)
        else:
            messages.append(message)
    return messages


def _goes_on(said: ChatMessage, more: ChatMessage) -> bool:
    """Whether a chat has both in one message of the assistant: calls, or what follows reasoning."""
    return said.role == "assistant" and (bool(more.tool_calls) or (said.content is None and said.tool_calls is None))


def _join(said: ChatMessage, more: ChatMessage) -> None:
    """Let the assistant's message go on with the next item."""
    said.content = more.content if said.content is None else said.content
    said.reasoning = more.reasoning if said.reasoning is None else said.reasoning
    if more.tool_calls:
        said.tool_calls = [*(said.tool_calls or ()), *more.tool_calls]


def _message(where: str, item: InputItem) -> ChatMessage:
    if item.type in (None, "message"):
        if item.role is None or item.content is None:
            raise OpenAIError(f"{where} must have a role and content", param="input")
        return ChatMessage(role=item.role, content=text_parts(f"{where}.content", item.content, _TEXTS))
    if item.type == "function_call":
        if item.name is None or item.call_id is None:
            raise OpenAIError(f"{where} must have a name and a call_id", param="input")
        call = ToolCall(FunctionCall(item.name, item.arguments), id=item.call_id, type="function")
        return ChatMessage(role="assistant", tool_calls=[call])
    if item.type == "function_call_output":
        if item.output is None or item.call_id is None:
            raise OpenAIError(f"{where} must have a call_id and an output", param="input")
        content = text_parts(f"{where}.output", item.output, _TEXTS)
        return ChatMessage(role="tool", content=content, tool_call_id=item.call_id)
    if item.type == "reasoning":
        parts = item.content if isinstance(item.content, list) else []
        text = "\n".join(part.text or "" for part in parts if part.type == "reasoning_text")
        return ChatMessage(role="assistant", reasoning=text)
    kinds = "message, reasoning, function_call and function_call_output"
    raise OpenAIError(f"{where} is of type {item.type!r:.80}, which is not supported: there are {kinds}", param="input")
