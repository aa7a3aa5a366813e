"""Requests of Anthropic's Messages API, and the chats that they are. Fields that are not here are refused by name."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from hasten.server.openai.params import OpenAIError, text_part, text_parts
from hasten.server.openai.types import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    Function,
    FunctionCall,
    FunctionName,
    NamedToolChoice,
    SharedFields,
    Tool,
    ToolCall,
)


class ContentBlock(ContentPart):
    """A part of a message: text, thinking, a call of a tool or its result; `type` says which."""

    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[ContentBlock] | None" = None
    is_error: bool | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class MessageTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    """As OpenAI's."""
    cache_control: Any = None
    """Without effect: prompts are cached as they are."""


class MessageToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Whether tools are to be called: auto, any, none, or the tool of a name."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """Whether the model is to think first. How long it does is its own choice: a budget has no effect."""

    type: Literal["enabled", "adaptive", "disabled"]


class CountRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/messages/count_tokens; `null` stands for a field that is left out."""

    model: str
    messages: list[Message]
    system: str | list[ContentBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: Any = None
    """Without effect, as in tools."""

    @property
    def wants_thinking(self) -> bool:
        """Whether the answer is to have what the model thinks."""
        return self.thinking is not None and self.thinking.type != "disabled"


class MessagesRequest(CountRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None
    """Without effect: nothing here depends on who asks."""
    service_tier: str | None = None

    # vLLM's extensions
    seed: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    """As in chats."""
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def as_chat(body: CountRequest) -> ChatRequest:
    """The chat that a request asks for; OpenAIError names what no model here can do."""
    same: dict[str, Any] = {"model": body.model}
    if isinstance(body, MessagesRequest):
        same = {name: getattr(body, name) for name in (*SharedFields.__struct_fields__, "max_tokens")}
        same["chat_template_kwargs"] = body.chat_template_kwargs
        if body.service_tier not in (None, "auto", "standard_only"):
            raise OpenAIError(f"service_tier={body.service_tier!r:.80} is not supported", param="service_tier")
        same["stop"] = body.stop_sequences
        same["include_reasoning"] = body.wants_thinking
        if body.thinking is not None:
            same["chat_template_kwargs"] = {"enable_thinking": body.wants_thinking} | (body.chat_template_kwargs or {})
    parallel = body.tool_choice is None or not body.tool_choice.disable_parallel_tool_use
    return ChatRequest(
        messages=list(_messages(body)),
        tools=None if body.tools is None else list(_tools(body.tools)),
        tool_choice=_choice(body),
        parallel_tool_calls=parallel,
        **same,
    )


def _choice(body: CountRequest) -> Literal["none", "auto", "required"] | NamedToolChoice | None:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise OpenAIError("tool_choice has no name", param="tool_choice")
        return NamedToolChoice(FunctionName(choice.name))
    return "required" if choice.type == "any" else choice.type


def _tools(tools: Sequence[MessageTool]) -> Iterator[Tool]:
    for number, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            message = f"tools[{number}] is of type {tool.type!r:.80}, which is not supported: there are functions alone"
            raise OpenAIError(message, param="tools")
        yield Tool("function", Function(tool.name, tool.description, tool.input_schema, tool.strict))


def _messages(body: CountRequest) -> Iterator[ChatMessage]:
    if body.system is not None:
        yield ChatMessage(role="system", content=text_parts("system", body.system))
    for number, message in enumerate(body.messages):
        yield from _message(f"messages[{number}]", message)


def _message(where: str, message: Message) -> Iterator[ChatMessage]:
    """The messages that one becomes: results of tools are messages of their own."""
    if isinstance(message.content, str):
        yield ChatMessage(role=message.role, content=message.content)
        return
    thoughts = list[str]()
    texts, calls, results = list[ContentPart](), list[ToolCall](), list[ChatMessage]()
    for number, block in enumerate(message.content):
        path = f"{where}.content[{number}]"
        if block.type == "tool_use" and message.role == "assistant":
            calls.append(_call(path, block))
        elif block.type == "tool_result" and message.role == "user":
            results.append(_result(path, block))
        elif block.type == "thinking" and message.role == "assistant":
            thoughts.append(block.thinking or "")
        else:
            texts.append(text_part(path, block))
    yield from results
    if texts or calls or not results:
        reasoning = "\n".join(thoughts) or None
        yield ChatMessage(role=message.role, content=texts or None, tool_calls=calls or None, reasoning=reasoning)


def _call(where: str, block: ContentBlock) -> ToolCall:
    if block.name is None or block.id is None:
        raise OpenAIError(f"{where} must have an id and a name", param="messages")
    return ToolCall(FunctionCall(block.name, json.dumps(block.input or {})), id=block.id, type="function")


def _result(where: str, block: ContentBlock) -> ChatMessage:
    if block.tool_use_id is None:
        raise OpenAIError(f"{where} has no tool_use_id", param="messages")
    content = text_parts(f"{where}.content", block.content or "")
    return ChatMessage(role="tool", content=content, tool_call_id=block.tool_use_id)
