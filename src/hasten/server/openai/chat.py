"""A chat request of OpenAI's API as the prompt of its model."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hasten.engine.chat import ChatTemplate, RenderLimits, chat_prompt
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import Reasoning
from hasten.server.openai.types import ChatMessage, ChatRequest
from hasten.server.tools.reasoning import reasoning_form

Descriptions = Sequence[Mapping[str, Any]] | None
"""Of tools, as templates know them."""
_encode = msgspec.json.Encoder().encode
_FOR_TEMPLATES = ("role", "content", "name", "tool_calls", "tool_call_id")


def characters(body: ChatRequest, tools: Descriptions = None) -> int:
    """Of all messages, and about those of the tools."""
    described = 0 if tools is None else len(_encode(tools))
    return described + sum(map(_characters, body.messages))


def _characters(message: ChatMessage) -> int:
    calls = 0 if not message.tool_calls else len(_encode(message.tool_calls))
    reasoning = len(message.reasoning or message.reasoning_content or "")
    if isinstance(message.content, list):
        return calls + reasoning + sum(len(part.text or "") for part in message.content)
    return calls + reasoning + len(message.content or "")


def chat_text(
    body: ChatRequest, template: ChatTemplate, limits: RenderLimits | None = None, tools: Descriptions = None
) -> str:
    """The prompt for a request's messages and tools; InvalidRequestError names what is wrong with them."""
    begins_answer = body.add_generation_prompt
    return chat_prompt(
        [_plain(message) for message in body.messages],
        template,
        tools=tools,
        add_generation_prompt=not body.continue_final_message if begins_answer is None else begins_answer,
        continue_final_message=bool(body.continue_final_message),
        variables=_variables(body, template),
        limits=limits,
    )


def chat_reasoning(body: ChatRequest, template: ChatTemplate, prompt: str, parser: str) -> Reasoning | None:
    """The reasoning that an answer to a prompt may begin with; `parser` is the option `reasoning_parser`."""
    form = reasoning_form(template.tool_source, parser)
    if form is None:
        return None
    stage = form.stage(prompt, _text(body.messages[-1]) if body.continue_final_message else None)
    return None if stage is None else Reasoning(form, stage, body.include_reasoning is not False)


def _variables(body: ChatRequest, template: ChatTemplate) -> dict[str, Any] | None:
    """What the template may know beside the messages; OpenAIError for an effort that it does not ask for."""
    effort = body.reasoning_effort
    if effort is None:
        return body.chat_template_kwargs
    if "reasoning_effort" not in template.tool_source:
        message = "reasoning_effort is not supported: the model's chat template has no room for it; leave it out"
        raise OpenAIError(message, param="reasoning_effort")
    return {"reasoning_effort": effort} | (body.chat_template_kwargs or {})


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return "\n".join(part.text or "" for part in message.content)
    return message.content or ""


def _plain(message: ChatMessage) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(message)
    plain = {name: values[name] for name in _FOR_TEMPLATES if name in values}
    reasoning = message.reasoning or message.reasoning_content
    if reasoning:
        plain["reasoning_content"] = reasoning
        if not (plain.get("content") and plain.get("tool_calls")):
            plain["thinking"] = reasoning  # as gpt-oss's template calls it, which refuses it beside those two
        if not plain.get("tool_calls"):
            plain.setdefault("content", "")
    return plain
