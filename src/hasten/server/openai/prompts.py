"""Prompts and chats of OpenAI's API as token ids: checked before any is begun, and made where it holds up nobody."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from hasten.core.errors import CheckpointError
from hasten.engine.chat import ChatTemplate, RenderLimits, chat_prompt
from hasten.engine.text import TextTooLongError
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient
from hasten.server.engine.wire import EngineInfo
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading, Reasoning, reading_of
from hasten.server.openai.tools import ToolUse
from hasten.server.openai.types import ChatMessage, ChatRequest
from hasten.server.tokenizing import SHORT_TEXT, tokenizing, unknown_token
from hasten.server.tools.reasoning import reasoning_form

Descriptions = Sequence[Mapping[str, Any]] | None
"""Of tools, as templates know them."""
_encode = msgspec.json.Encoder().encode
_FOR_TEMPLATES = ("role", "content", "name", "tool_calls", "tool_call_id")


def characters(body: ChatRequest, tools: Descriptions = None) -> int:
    """Of all messages, and about those of the tools."""
    count = 0 if tools is None else len(_encode(tools))
    for message in body.messages:
        count += sum(map(len, (message.reasoning or message.reasoning_content or "", *_texts(message))))
        count += 0 if not message.tool_calls else len(_encode(message.tool_calls))
    return count


def _texts(message: ChatMessage) -> list[str]:
    if isinstance(message.content, list):
        return [part.text or "" for part in message.content]
    return [message.content or ""]


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
    stage = form.stage(prompt, "\n".join(_texts(body.messages[-1])) if body.continue_final_message else None)
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


_FEW_MESSAGES = 32
"""Which are rendered at once."""
_RENDER_S = 2.0
"""Of CPU time for a chat's prompt, at most."""
_TOKEN_BYTES = 4


class ChatPrompts:
    """Prompts of chats, by the templates of the engines' tokenizers."""

    def __init__(self) -> None:
        self._templates: WeakKeyDictionary[EngineClient, ChatTemplate | None] = WeakKeyDictionary()
        self._reading = asyncio.Lock()

    async def chat(
        self, body: ChatRequest, client: EngineClient, *, add_special_tokens: bool = False
    ) -> tuple[list[int], AnswerReading | None]:
        """Token ids of a chat, and how its answer is read. The template writes special tokens itself."""
        template, tokenizer = await self._template(client), client.tokenizer
        assert tokenizer is not None, "it has a template"
        tools = ToolUse.of(body, template, client.config.tool_call_parser)
        prompt = await _rendered(body, template, client, tools)
        reasoning = chat_reasoning(body, template, prompt, client.config.reasoning_parser)
        (tokens,) = await tokenized([prompt], client, "messages", add_special_tokens=add_special_tokens)
        return tokens, reading_of(tokenizer, client.info.eos_token_ids, tools, reasoning)

    async def has_template(self, client: EngineClient) -> bool:
        """Whether an engine answers chats: one whose template is not valid has errors for them."""
        try:
            return client.info.pooling is None and await self._template_of(client) is not None
        except CheckpointError:
            return False

    async def _template(self, client: EngineClient) -> ChatTemplate:
        if client.info.tokenizer_folder is None:
            raise OpenAIError("the model has no tokenizer; use /v1/completions with token ids")
        if (template := await self._template_of(client)) is None:
            raise OpenAIError("the model's tokenizer has no chat template; use /v1/completions")
        return template

    async def _template_of(self, client: EngineClient) -> ChatTemplate | None:
        folder = client.info.tokenizer_folder
        if folder is not None and client not in self._templates:
            async with self._reading:
                if client not in self._templates:  # whoever had the lock may have read it
                    self._templates[client] = await asyncio.to_thread(ChatTemplate.from_folder, folder)
        return self._templates.get(client)


async def _rendered(body: ChatRequest, template: ChatTemplate, client: EngineClient, tools: ToolUse | None) -> str:
    """The prompt for a request's messages, rendered where it holds up nobody; nothing is for what must be too long."""
    described = None if tools is None else tools.descriptions
    count, longest = characters(body, described), client.most_characters
    if count > longest:
        what = "messages and tools" if described else "messages"
        raise OpenAIError(
            f"the {what} have {count} characters; what the model can take has at most {longest}",
            param="messages",
            code="context_length_exceeded",
        )
    limits = RenderLimits(longest, _RENDER_S)
    if count <= SHORT_TEXT and len(body.messages) <= _FEW_MESSAGES and not body.chat_template_kwargs:
        return chat_text(body, template, limits, described)
    with client.counting_refusals():
        return await tokenizing.run(partial(chat_text, body, template, limits, described))


async def tokenized(
    prompts: Sequence[str | list[int]], client: EngineClient, param: str, *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each prompt, all texts or all token ids; OpenAIError where one cannot be served."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    found = [prompt for prompt in prompts if not isinstance(prompt, str)]
    found += await encoded(texts, client, param, add_special_tokens=add_special_tokens)

    def check() -> None:
        for ids in found:
            _check_tokens(ids, client.info, param)

    await by_size(_TOKEN_BYTES * sum(map(len, found)), check)
    return found


async def encoded(
    texts: Sequence[str], client: EngineClient, param: str, *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each text; OpenAIError where one is too long for the model."""
    if not texts:
        return []
    if client.tokenizer is None:
        raise OpenAIError("the model has no tokenizer; send token ids", param=param)
    try:
        return await client.tokenize(texts, add_special_tokens=add_special_tokens)
    except TextTooLongError as error:
        raise _too_long(error.count, client.info, param) from None


def _too_long(count: str, info: EngineInfo, param: str) -> OpenAIError:
    message = f"the {param} has {count} tokens; the model's longest sequence has {info.max_model_len}"
    return OpenAIError(message, param=param, code="context_length_exceeded")


def _check_tokens(ids: list[int], info: EngineInfo, param: str) -> None:
    """OpenAIError for a prompt without tokens, with too many of them, or with one outside the vocabulary."""
    if not ids:
        raise OpenAIError("the prompt has no tokens", param=param)
    if len(ids) >= info.max_model_len:
        raise _too_long(str(len(ids)), info, param)
    if (wrong := unknown_token(ids, info.vocab_size)) is not None:
        raise OpenAIError(f"the prompt has token id {wrong}; the vocabulary ends at {info.vocab_size - 1}", param=param)
