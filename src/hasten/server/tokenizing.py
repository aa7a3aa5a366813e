"""Texts become tokens here for all doors of the server: bounded by their bytes first, and where they hold up nobody."""

import asyncio
from collections.abc import Callable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hasten.core.errors import InvalidRequestError
from hasten.core.sampling import RULES
from hasten.engine.text import Tokenizer
from hasten.server.engine.queue import QueueFullError
from hasten.server.options import SecurityOptions

SHORT_TEXT = 2048
"""Characters that are tokenized at once: it takes a few milliseconds."""
MAX_DECODED = 1 << 18
"""Tokens of one text: decoding them holds Python's lock."""
FEW_DECODED = 4096
"""Which are decoded at once."""
_THREADS = 2
_MAX_WAITING = 256
"""Requests whose texts wait for a thread; each text is one that may fit."""
_MAX_WORDS, _MAX_WORDS_CHARACTERS = 1024, 16 << 10
"""Of one request: words that are to stop or must not appear are looked at for each token."""
MAX_PROMPT_LOGPROBS = 1 << 22
"""Log-probabilities of the tokens of all prompts of a request: some 600 MiB of memory."""
_MAX_ENTRIES = {name: rule.most for name, rule in RULES.items() if rule.most is not None}

Result = TypeVar("Result")


class Tokenizing:
    """Threads that tokenize and decode, a few for the whole process."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")
        self._waiting = 0

    async def encode(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        *,
        most_tokens: int | None = None,
        max_bytes: int = SecurityOptions.max_text_bytes,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Token ids of each text.

        TextTooLongError where one has more than `most_tokens`, which most often shows in its bytes alone;
        InvalidRequestError where it is not UTF-8, or is longer than `max_bytes` and nothing else bounds it.
        QueueFullError where too many texts wait.
        """
        if most_tokens is None or tokenizer.most_bytes_per_token is None:
            check_bytes("the text", texts, max_bytes)

        def work() -> list[list[int]]:
            return [
                tokenizer.encode_batch([text], add_special_tokens=add_special_tokens, most_tokens=most_tokens)[0]
                for text in texts
            ]

        if sum(map(len, texts)) <= SHORT_TEXT:
            return work()
        if most_tokens is not None:
            for text in texts:
                tokenizer.check_length(len(text), most_tokens)
        return await self.run(work)

    async def decode(self, tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int) -> str:
        """Text of token ids, special ones included; InvalidRequestError where they are too many, or unknown."""
        if len(ids) > MAX_DECODED:
            raise InvalidRequestError(f"there are {len(ids)} tokens, the limit is {MAX_DECODED}")
        if (wrong := unknown_token(ids, vocab_size)) is not None:
            raise InvalidRequestError(f"there is token id {wrong}; the vocabulary ends at {vocab_size - 1}")

        def work() -> str:
            return tokenizer.decode(ids, skip_special_tokens=False)

        return work() if len(ids) <= FEW_DECODED else await self.run(work)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do some work on one of the threads."""
        if self._waiting >= _MAX_WAITING:
            raise QueueFullError(f"the texts of {self._waiting} requests wait to be tokenized; try again later")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._waiting -= 1


def unknown_token(ids: Sequence[int], vocab_size: int) -> int | None:
    """The first token id that is not in a vocabulary; None where all are."""
    if not ids or 0 <= min(ids) <= max(ids) < vocab_size:
        return None
    return next(token for token in ids if not 0 <= token < vocab_size)


def check_bytes(name: str, texts: Sequence[str], most: int) -> None:
    """InvalidRequestError where a text has more bytes; characters are counted first, which takes no time."""
    for text in texts:
        if len(text) > most or len(text.encode(errors="replace")) > most:
            raise InvalidRequestError(f"{name} has more than {most} bytes, which is the limit (--max-text-bytes)")


def check_entries(given: Mapping[str, object]) -> None:
    """InvalidRequestError where sampling parameters, by name, have more entries than should be looked at.

    It takes no time: to be called before they become SamplingParams, which look at each.
    """
    for name, value in given.items():
        most = _MAX_ENTRIES.get(name)
        if most is not None and isinstance(value, Sized) and not isinstance(value, str) and len(value) > most:
            raise InvalidRequestError(f"{name} has {len(value)} entries, the limit is {most}")


def check_prompt_logprobs(tokens: int, count: int | None, vocab_size: int) -> None:
    """InvalidRequestError where prompt tokens have too many log-probabilities in all: `count` each, and their own."""
    each = 0 if count is None else min(count, vocab_size) + 1
    if tokens * each > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"the prompts have {tokens} tokens with {each} log-probabilities each; the limit of a request is "
            f"{MAX_PROMPT_LOGPROBS} in all"
        )


def check_words(name: str, words: Sequence[str]) -> None:
    """InvalidRequestError where there are more words than should be looked for."""
    if len(words) > _MAX_WORDS:
        raise InvalidRequestError(f"{name} has {len(words)} entries, the limit is {_MAX_WORDS}")
    characters = sum(map(len, words))
    if characters > _MAX_WORDS_CHARACTERS:
        raise InvalidRequestError(f"{name} has {characters} characters, the limit is {_MAX_WORDS_CHARACTERS}")


tokenizing = Tokenizing()
"""The process's own."""
