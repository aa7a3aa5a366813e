"""Requests of Anthropic's Messages API. A field that is not here is refused by its name."""

from typing import Any, Literal

import msgspec


class ContentBlock(msgspec.Struct):
    """A part of a message: text, thinking, a call of a tool or its result; `type` says which."""

    type: str
    text: str | None = None
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
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    """Without effect: nothing here depends on who asks."""
    service_tier: str | None = None

    # vLLM's extensions
    seed: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    """As in chats."""
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
