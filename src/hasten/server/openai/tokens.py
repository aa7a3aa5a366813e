"""vLLM's routes for a model's tokenizer: texts and chats to token ids, and back, within the limits of prompts."""

from functools import partial
from typing import Any

import msgspec

from hasten.core.errors import InvalidRequestError
from hasten.engine.text import Tokenizer
from hasten.server.engine.client import EngineClient
from hasten.server.openai.params import OpenAIError, check_chat
from hasten.server.openai.prompts import ChatPrompts, encoded
from hasten.server.openai.types import ChatMessage, ChatRequest, Tool
from hasten.server.tokenizing import tokenizing

_encode = msgspec.json.Encoder().encode


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize: either a prompt or the messages of a chat."""

    model: str | None = None
    """The server's only one, where it is left out."""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """By default a prompt gets them, and a chat has those of its template."""
    return_token_strs: bool | None = None
    """Whether the answer has the vocabulary's own text of each token."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


async def token_ids(body: TokenizeRequest, client: EngineClient, chats: ChatPrompts) -> bytes:
    """The answer to a TokenizeRequest: `count`, `max_model_len`, `tokens` and perhaps `token_strs`."""
    ids = await _ids(body, client, chats)
    with client.counting_refusals():
        texts = await tokenizing.run(partial(_tokenizer(client).tokens, ids)) if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": client.info.max_model_len, "tokens": ids, "token_strs": texts}
    return _encode(answer)


async def _ids(body: TokenizeRequest, client: EngineClient, chats: ChatPrompts) -> list[int]:
    given = body.add_special_tokens
    if (body.prompt is None) == (body.messages is None):
        raise OpenAIError("give either a prompt or messages", param="prompt")
    if body.prompt is not None:
        special = True if given is None else given
        return (await encoded([body.prompt], client, "prompt", add_special_tokens=special))[0]
    chat = ChatRequest(
        model="",
        messages=body.messages or [],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
    )
    check_chat(chat)
    return (await chats.chat(chat, client, add_special_tokens=bool(given)))[0]


async def text_of(body: DetokenizeRequest, client: EngineClient) -> bytes:
    """The answer to a DetokenizeRequest: the text of its tokens, special ones included, as `prompt`."""
    try:
        with client.counting_refusals():
            text = await tokenizing.decode(_tokenizer(client), body.tokens, client.info.vocab_size)
    except InvalidRequestError as error:
        raise OpenAIError(str(error), param="tokens") from None
    return _encode({"prompt": text})


def _tokenizer(client: EngineClient) -> Tokenizer:
    if client.tokenizer is None:
        raise OpenAIError("the model has no tokenizer")
    return client.tokenizer
