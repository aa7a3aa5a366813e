"""A chat request of OpenAI's API as the prompt of its model."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hasten.engine.chat import ChatTemplate, RenderLimits, chat_prompt
from hasten.server.openai.types import ChatMessage, ChatRequest

Descriptions = Sequence[Mapping[str, Any]] | None
"""Of tools, as templates know them."""
_encode = msgspec.json.Encoder().encode
_FOR_TEMPLATES = ("role", "content", "name", "tool_calls", "tool_call_id")


def characters(asked: ChatRequest, tools: Descriptions = None) -> int:
    """Of all messages, and about those of the tools."""
    described = 0 if tools is None else len(_encode(tools))
    return described + sum(map(_characters, asked.messages))


def _characters(message: ChatMessage) -> int:
    calls = 0 if not message.tool_calls else len(_encode(message.tool_calls))
    if isinstance(message.content, list):
        return calls + sum(len(part.text or "") for part in message.content)
    return calls + len(message.content or "")


def chat_text(
    asked: ChatRequest, template: ChatTemplate, limits: RenderLimits | None = None, tools: Descriptions = None
) -> str:
    """The prompt for a request's messages and tools; InvalidRequestError names what is wrong with them."""
    begins_answer = asked.add_generation_prompt
    return chat_prompt(
        [_plain(message) for message in asked.messages],
        template,
        tools=tools,
        add_generation_prompt=not asked.continue_final_message if begins_answer is None else begins_answer,
        continue_final_message=bool(asked.continue_final_message),
        variables=asked.chat_template_kwargs,
        limits=limits,
    )


def _plain(message: ChatMessage) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(message)
    return {name: values[name] for name in _FOR_TEMPLATES if name in values}
