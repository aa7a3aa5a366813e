"""Prompts of OpenAI's API as token ids: checked before any of them is begun, and made where it holds up nobody."""

import asyncio
from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

from hasten.core.errors import CheckpointError
from hasten.engine.chat import ChatTemplate, RenderLimits
from hasten.engine.text import TextTooLongError
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient, EngineInfo
from hasten.server.openai.chat import characters, chat_reasoning, chat_text
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading, reading_of
from hasten.server.openai.tools import ToolUse
from hasten.server.openai.types import ChatRequest
from hasten.server.tokenizing import SHORT_TEXT, tokenizing

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
        template, tokenizer, ends = await self._template(client), client.tokenizer, client.info.eos_token_ids
        assert tokenizer is not None, "it has a template"
        tools = ToolUse.of(body, template, tokenizer, ends, client.tool_call_parser)
        prompt = await _rendered(body, template, client, tools)
        reasoning = chat_reasoning(body, template, prompt, client.reasoning_parser)
        (tokens,) = await tokenized([prompt], client, "messages", add_special_tokens=add_special_tokens)
        return tokens, reading_of(tokenizer, ends, tools, reasoning)

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
    """Token ids of each prompt; OpenAIError where one of them cannot be served, before any is begun."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    await check_tokens([prompt for prompt in prompts if not isinstance(prompt, str)], client.info, param)
    texts_ids = await encoded(texts, client, param, add_special_tokens=add_special_tokens)
    await check_tokens(texts_ids, client.info, param)
    of_texts = iter(texts_ids)
    return [next(of_texts) if isinstance(prompt, str) else prompt for prompt in prompts]


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


async def check_tokens(prompts: Sequence[list[int]], info: EngineInfo, param: str) -> None:
    """OpenAIError for a prompt without tokens, with too many of them, or with one outside the vocabulary."""

    def work() -> None:
        for ids in prompts:
            _check_tokens(ids, info, param)

    await by_size(_TOKEN_BYTES * sum(map(len, prompts)), work)


def _too_long(count: str, info: EngineInfo, param: str) -> OpenAIError:
    message = f"the {param} has {count} tokens; the model's longest sequence has {info.max_model_len}"
    return OpenAIError(message, param=param, code="context_length_exceeded")


def _check_tokens(ids: list[int], info: EngineInfo, param: str) -> None:
    if not ids:
        raise OpenAIError("the prompt has no tokens", param=param)
    if len(ids) >= info.max_model_len:
        raise _too_long(str(len(ids)), info, param)
    if not 0 <= min(ids) <= max(ids) < info.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < info.vocab_size)
        raise OpenAIError(f"the prompt has token id {wrong}; the vocabulary ends at {info.vocab_size - 1}", param=param)
