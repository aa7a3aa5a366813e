"""A chat request of OpenAI's API as the prompt of its model."""

from typing import Any

import msgspec

from hasten.engine.chat import ChatTemplate, RenderLimits, chat_prompt
from hasten.server.openai.types import ChatMessage, ChatRequest

_FOR_TEMPLATES = ("role", "content", "name", "tool_calls", "tool_call_id")


def characters(asked: ChatRequest) -> int:
    """Of all messages."""
    return sum(map(_characters, asked.messages))


def _characters(message: ChatMessage) -> int:
    if isinstance(message.content, list):
        return sum(len(part.text or "") for part in message.content)
    return len(message.content or "")


def chat_text(asked: ChatRequest, template: ChatTemplate, limits: RenderLimits | None = None) -> str:
    """The prompt for a request's messages; InvalidRequestError names what is wrong with them."""
    begins_answer = asked.add_generation_prompt
    return chat_prompt(
        [_plain(message) for message in asked.messages],
        template,
        add_generation_prompt=not asked.continue_final_message if begins_answer is None else begins_answer,
        continue_final_message=bool(asked.continue_final_message),
        variables=asked.chat_template_kwargs,
        limits=limits,
    )


def _plain(message: ChatMessage) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(message)
    return {name: values[name] for name in _FOR_TEMPLATES if name in values}
