"""From a row of the input to prompts and sampling parameters, as OpenAI's API reads a request."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from msgspec import Raw

from hasten.batch.engine import BatchEngine
from hasten.batch.source import Row
from hasten.core.structured_outputs import STRUCTURED
from hasten.core.types import SamplingParams
from hasten.server.openai.choices import ChatChoices, Choices, completion_choices
from hasten.server.openai.params import CONSTRAINING, OpenAIError, chat_params, check_chat, completion_params, decode
from hasten.server.openai.prompts import chat_reasoning, chat_text
from hasten.server.openai.reading import reading_of
from hasten.server.openai.tools import ToolUse
from hasten.server.openai.types import ChatRequest, CompletionRequest, GenerationRequest

_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"
_FORM = frozenset({"custom_id", "method", "url", "body"})
"""Fields of a row in OpenAI's form."""
_decode_row = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_completion, _decode_chat = msgspec.json.Decoder(CompletionRequest), msgspec.json.Decoder(ChatRequest)
_encode = msgspec.json.Encoder().encode
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NULL = b"null"


@dataclass(frozen=True)
class RowRequest:
    """One row, ready to be computed."""

    call: str
    """text_completion or chat.completion."""
    model: str
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    """Of each prompt."""
    choices: Choices
    prompts_only: bool = False
    cache_salt: str = ""


class RowReader:
    """Reads rows for one engine.

    `models` are the names that a row may give for the model, `defaults` the fields of a body that does not have them.
    """

    def __init__(self, engine: BatchEngine, models: Sequence[str], defaults: Mapping[str, Any]) -> None:
        self._engine = engine
        self._models = models
        self._defaults = {name: Raw(_encode(value)) for name, value in defaults.items()}

    def read(self, row: Row) -> RowRequest:
        """The request in a row; OpenAIError or InvalidRequestError says what is wrong with it."""
        url, fields = self._call(row)
        if url == _CHATS:
            body: GenerationRequest = decode(self._completed(fields, chat=True), _decode_chat)
        else:
            body = decode(self._completed(fields, chat=False), _decode_completion)
        if body.model not in self._models:
            message = f"the model {body.model!r:.200} is not the batch's; it is called: {', '.join(self._models)}"
            raise OpenAIError(message, status=404, param="model", code="model_not_found")
        if body.stream:
            raise OpenAIError("stream is not supported in a batch; leave it out", param="stream")
        has_seed = body.seed is not None
        if not has_seed:
            body.seed = self._seed(row, 0)
        request = self._chat(body) if isinstance(body, ChatRequest) else self._completion(body)
        if has_seed or len(request.prompts) == 1 or request.params[0].is_plain:
            return request
        each = [replace(params, seed=self._seed(row, index)) for index, params in enumerate(request.params)]
        return replace(request, params=each)

    def _call(self, row: Row) -> tuple[str, dict[str, Raw]]:
        """The URL and the body of a row, which is in OpenAI's form or is a body itself."""
        fields = _fields(row.text, "the row")
        if not fields.keys() & {"url", "body", "method"}:
            fields.pop("custom_id", None)
            fields.pop("id", None)
            if "prompt_token_ids" in fields:
                if "prompt" in fields:
                    raise OpenAIError("the row has both prompt and prompt_token_ids; give one of them", param="prompt")
                fields["prompt"] = fields.pop("prompt_token_ids")
            return (_CHATS if "messages" in fields else _COMPLETIONS), fields
        if unknown := sorted(fields.keys() - _FORM):
            raise OpenAIError(f"the row has an unknown field {unknown[0]!r:.80}; there are: {', '.join(sorted(_FORM))}")
        if missing := sorted({"custom_id", "url", "body"} - fields.keys()):
            raise OpenAIError(f"the row has no {missing[0]}", param=missing[0])
        method, url = _text(fields, "method", "POST"), _text(fields, "url", "")
        if method != "POST" or url not in (_COMPLETIONS, _CHATS):
            message = f"{method} {url} is not supported; there are POST {_COMPLETIONS} and POST {_CHATS}"
            raise OpenAIError(message, status=404, param="url", code="unknown_url")
        return url, _fields(bytes(fields["body"]), "body")

    def _completed(self, body: Mapping[str, Raw], *, chat: bool) -> bytes:
        """The JSON of a body with what the batch says of all rows."""
        own = {name: value for name, value in body.items() if bytes(value).strip() != _NULL}
        common = dict(self._defaults)
        if chat and "max_completion_tokens" in own:
            common.pop("max_tokens", None)
        if own.keys() & CONSTRAINING:
            common.pop(STRUCTURED, None)
        return _encode({"model": self._models[0], **common, **own})

    def _completion(self, body: CompletionRequest | GenerationRequest) -> RowRequest:
        assert isinstance(body, CompletionRequest)
        prompts = body.prompts()
        params = completion_params(body, len(prompts))
        choices = completion_choices(body, prompts, params, self._engine.tokenizer)
        ids = self._encoded(prompts)
        call = "text_completion"
        salt = body.cache_salt or ""
        return RowRequest(call, body.model, ids, [params] * len(ids), choices, body.shows_prompts_only, salt)

    def _chat(self, body: ChatRequest) -> RowRequest:
        check_chat(body)
        template = self._engine.template
        if template is None:
            raise OpenAIError("the model's tokenizer has no chat template; use prompts, or /v1/completions")
        engine, tokenizer = self._engine, self._engine.tokenizer
        assert tokenizer is not None, "it has a template"
        tools = ToolUse.of(body, template, engine.tool_call_parser)
        text = chat_text(body, template, tools=None if tools is None else tools.descriptions)
        reasoning = chat_reasoning(body, template, text, engine.reasoning_parser)
        reading = reading_of(tokenizer, engine.eos_token_ids, tools, reasoning)
        # the template writes special tokens itself
        (ids,) = self._encoded([text], add_special_tokens=False)
        params = chat_params(body, engine.max_model_len - len(ids), reading)
        choices = ChatChoices(body.top_logprobs or 0, reading, params.skip_special_tokens)
        return RowRequest("chat.completion", body.model, [ids], [params], choices, cache_salt=body.cache_salt or "")

    def _encoded(self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool = True) -> list[list[int]]:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        tokenizer = self._engine.tokenizer
        if texts and tokenizer is None:
            raise OpenAIError("the model has no tokenizer; give token ids", param="prompt")
        encoded: list[list[int]] = []
        if texts and tokenizer is not None:
            encoded = tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        of_texts = iter(encoded)
        return [next(of_texts) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _seed(self, row: Row, index: int) -> int:
        """The seed of a row's prompt that has none: its own, so that it does not matter when the row is computed."""
        name = f"{self._engine.seed} {row.number} {index}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _fields(text: bytes, what: str) -> dict[str, Raw]:
    try:
        return _decode_row(text)
    except msgspec.ValidationError:
        raise OpenAIError(f"{what} is not a JSON object") from None
    except _NOT_JSON as error:
        raise OpenAIError(f"{what} is not valid JSON: {error}") from None


def _text(fields: Mapping[str, Raw], name: str, default: str) -> str:
    try:
        return msgspec.json.decode(fields[name], type=str) if name in fields else default
    except _NOT_JSON:
        raise OpenAIError(f"{name} is not a string", param=name) from None
