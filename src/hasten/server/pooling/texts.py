"""Texts as requests to a model that makes vectors or scores of them: bounded first, then tokenized piece by piece."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from hasten.core.errors import InvalidRequestError
from hasten.core.types import PoolingParams, Request
from hasten.engine.fill_mask import no_mask
from hasten.engine.prompts import given_prompts
from hasten.engine.text import TextTooLongError, Tokenizer
from hasten.engine.texts import Instruction, TextRequests
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient
from hasten.server.tokenizing import SHORT_TEXT, check_bytes, tokenizing, unknown_token

Pair = tuple[str, str]
Item = TypeVar("Item", str, Pair)
_PIECE = 32 << 10
"""Characters that are tokenized without a turn for others: some 20 ms of a thread."""
_TOKEN_BYTES = 4
_NO_INSTRUCTION = Instruction()


class TextLengthError(InvalidRequestError):
    """A text that has more tokens than the model takes."""


class TextReader:
    """Makes requests to one model of the texts that a client sent. `name` is what messages call them."""

    def __init__(self, client: EngineClient, params: PoolingParams, name: str) -> None:
        pooling = client.info.pooling
        assert pooling is not None, "whether it makes vectors or scores was looked at before"
        self._client = client
        self._params = params
        self._name = name
        self._longest = client.most_prompt_tokens
        self._requests = TextRequests(pooling.texts, client.tokenizer, self._longest)

    async def prompts(self, prompts: Sequence[str | list[int]], before: Instruction = _NO_INSTRUCTION) -> list[Request]:
        """A request of each text, or of each list of token ids, with what stands before texts.

        InvalidRequestError names the one that cannot be served.
        """
        ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if ids:  # a client sends either ids or texts
            return await by_size(_TOKEN_BYTES * sum(map(len, ids)), self._of_ids, ids)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        tokenizer = self._checked_tokenizer(texts)

        def tokenize(piece: Sequence[str]) -> list[tuple[str, Request]]:
            return list(self._requests.of_prompts(given_prompts(piece), self._params, before))

        return await self._tokenized(tokenizer, texts, tokenize)

    async def pairs(self, pairs: Sequence[Pair]) -> list[Request]:
        """A request of each pair of texts, which are read together; errors are those of `prompts`."""
        tokenizer = self._checked_tokenizer([text for pair in pairs for text in pair])

        def tokenize(piece: Sequence[Pair]) -> list[tuple[str, Request]]:
            return list(self._requests.of_pairs(piece, self._params))

        return await self._tokenized(tokenizer, pairs, tokenize)

    def _checked_tokenizer(self, texts: Sequence[str]) -> Tokenizer:
        """The tokenizer; InvalidRequestError where a text is longer than should be tokenized."""
        tokenizer = self._client.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("the model has no tokenizer; send token ids, or start it with --tokenizer-path")
        if self._params.truncate_prompt_tokens is not None or tokenizer.most_bytes_per_token is None:
            check_bytes(f"{self._name}: a text", texts, self._client.max_text_bytes)
            return tokenizer
        for number, text in enumerate(texts):
            try:
                tokenizer.check_length(len(text), self._longest)
            except TextTooLongError as error:
                raise self._too_long(number, error.count) from None
        return tokenizer

    async def _tokenized(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[Item],
        tokenize: Callable[[Sequence[Item]], list[tuple[str, Request]]],
    ) -> list[Request]:
        if sum(map(_characters, texts)) <= SHORT_TEXT:
            return self._checked(0, tokenize(texts))
        found: list[Request] = []
        for piece in _pieces(texts):
            with self._client.counting_refusals():
                found += self._checked(len(found), await tokenizing.run(partial(tokenize, piece)))
        return found

    def _checked(self, begin: int, requests: Sequence[tuple[str, Request]]) -> list[Request]:
        for number, (_, request) in enumerate(requests, start=begin):
            if not request.prompt_token_ids:
                raise InvalidRequestError(f"{self._name}[{number}] has no tokens")
            if len(request.prompt_token_ids) > self._longest:
                raise self._too_long(number, str(len(request.prompt_token_ids)))
            if self._params.task == "fill_mask" and not request.masks:
                raise InvalidRequestError(f"{self._name}[{number}]: {no_mask(self._client.tokenizer)}")
        return [request for _, request in requests]

    def _of_ids(self, prompts: Sequence[list[int]]) -> list[Request]:
        vocab, most = self._client.info.vocab_size, self._params.truncate_prompt_tokens
        limit = None if most is None else self._longest if most == -1 else min(most, self._longest)
        for number, ids in enumerate(prompts):
            if (wrong := unknown_token(ids, vocab)) is not None:
                raise InvalidRequestError(
                    f"{self._name}[{number}] has token id {wrong}; the vocabulary ends at {vocab - 1}"
                )
        given = given_prompts([ids[:limit] for ids in prompts])
        return self._checked(0, list(self._requests.of_prompts(given, self._params, _NO_INSTRUCTION)))

    def _too_long(self, number: int, count: str) -> TextLengthError:
        return TextLengthError(
            f"{self._name}[{number}] has {count} tokens; the model takes at most {self._longest}: shorten it, or set "
            "truncate_prompt_tokens"
        )


def _characters(item: str | Pair) -> int:
    return len(item) if isinstance(item, str) else sum(map(len, item))


def _pieces(texts: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The texts in runs of a few characters, or of one long text."""
    begin = size = 0
    for end, text in enumerate(texts):
        length = _characters(text)
        if size and size + length > _PIECE:
            yield texts[begin:end]
            begin, size = end, 0
        size += length
    yield texts[begin:]
