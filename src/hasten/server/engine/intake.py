"""What becomes of a prompt before it is queued: bounded, tokenized, and packed for the engine's process."""

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path

from hasten.core.config import EngineConfig
from hasten.core.errors import InvalidRequestError
from hasten.core.types import PoolingParams, Request, SamplingParams
from hasten.engine.text import Tokenizer
from hasten.server.call import cache_salt, current_call
from hasten.server.engine.assigned import prefixes_of
from hasten.server.engine.queue import Queueing, QueueLimits
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import Add, EngineInfo, framed
from hasten.server.tokenizing import check_entries, check_prompt_logprobs, check_words, tokenizing


def _tokenizer(folder: str) -> Tokenizer:
    """A folder's tokenizer, with what the first text would else wait for."""
    tokenizer = Tokenizer.from_folder(folder)
    _ = tokenizer.most_bytes_per_token
    return tokenizer


_SHORT_PROMPT = 256
"""Tokens of prompts of which a thousand may begin at once: it takes some ten milliseconds."""
_FEW_WORDS = 8
"""Which are tokenized at once."""
_MOST_COMPLETIONS = 1024
"""Of one request: each is a sequence in the engine from the end of its prompt on."""
_MOST_LOGPROBS = 1024
"""Of one token."""


class Intake:
    """Makes tickets of requests to the `engines` engines of one model. QueueError where tokenizing has no room.

    Nothing is known of the model until the first engine has loaded it; `_foresee` begins to load the tokenizer before.
    """

    def __init__(self, config: EngineConfig, limits: QueueLimits, engines: int) -> None:
        self.config = config
        self.info: EngineInfo
        """What its engines are, which are alike: the cache's blocks are those of all."""
        self.tokenizer: Tokenizer | None = None
        """Of its texts; None where the model has none."""
        self._limits = limits
        self._engines = engines
        self._numbers = 0
        self._beginning = asyncio.Lock()
        self._started = False
        """Whether all engines have been there: from then on each that comes is a new process of an old one."""
        self._foreseen: tuple[str, asyncio.Task[Tokenizer]] | None = None
        """A folder and the tokenizer in it, which is being loaded."""
        self._taking = asyncio.Lock()
        self._infos: dict[Hashable, EngineInfo] = {}

    def _foresee(self) -> None:
        """Begin to load the tokenizer of the model's folder, while the engines load the model."""
        folder = self.config.tokenizer or self.config.model
        if Path(folder, "tokenizer.json").is_file():
            loading = asyncio.create_task(asyncio.to_thread(_tokenizer, folder))
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever needs it asks
            self._foreseen = (folder, loading)

    async def prepare(self, engine: Hashable, info: EngineInfo) -> None:
        """Take in what an engine is that has loaded its model, and load the tokenizer.

        That is done once at the start, and anew for each new process.
        """
        async with self._taking:
            if info.tokenizer_folder is not None and (self._started or self.tokenizer is None):
                self.tokenizer = await self._load_tokenizer(info.tokenizer_folder)
        self._infos[engine] = info
        self.info = EngineInfo.of_all(list(self._infos.values()))

    async def _load_tokenizer(self, folder: str) -> Tokenizer:
        """The tokenizer that engines name, which is most often the foreseen one."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen[0] == folder:
            return await foreseen[1]
        return await asyncio.to_thread(_tokenizer, folder)

    def _check(self, params: SamplingParams) -> None:
        """InvalidRequestError where the model does not generate text, or each token would take long."""
        self.info.check_task(params)
        _check_sizes(params, self.info.vocab_size)

    async def _ticket(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        queueing: Queueing,
        *,
        stream: bool,
    ) -> Ticket:
        """A request for text that `_check` let pass; see `EngineClient.submit`."""
        info, salt = self.info, cache_salt(queueing.salt)
        tokens = await self._tokens(prompt)
        check_prompt_logprobs(len(tokens), params.prompt_logprobs, info.vocab_size)
        params = await self._without_words(params)
        number = self._next_number(queueing.priority)
        frame = _frame(Add(number, tokens, params.given(), stream, cache_salt=salt))
        most = params.max_length(len(tokens), info.max_model_len) - len(tokens)
        width = max(params.n, params.beam_width)
        prefixes = self._prefixes(tokens, params, salt)
        priority, may_stop = queueing.priority, _may_stop(params)
        return Ticket(number, tokens, width, frame, priority, most, may_stop, prefixes=prefixes)

    async def _text_ticket(self, request: Request, queueing: Queueing) -> Ticket:
        """A text of which a vector or scores are to be made."""
        assert request.pooling is not None, "it says what to make of the text"
        tokens = request.prompt_token_ids
        self._check_length(tokens)
        await self._spread(len(tokens))
        number = self._next_number(queueing.priority)
        extra = request.token_type_ids, request.skipped_tokens, request.masks
        message = Add(number, tokens, None, False, request.pooling, *extra)
        message.cache_salt = cache_salt(queueing.salt)
        return Ticket(number, tokens, 1, _frame(message), queueing.priority)

    @property
    def most_prompt_tokens(self) -> int:
        """Longest prompt that is taken: one token at least must fit behind it, where any are generated."""
        info = self.info
        most = info.max_model_len - (1 if info.pooling is None else 0)
        limit = self._limits.max_prompt_tokens
        return most if limit is None else min(most, limit)

    @property
    def most_characters(self) -> int:
        """Of a text that may fit a prompt; where its tokens do not say, the limit that stands in for them."""
        tokenizer = self.tokenizer
        each = None if tokenizer is None else tokenizer.most_bytes_per_token
        return self._limits.max_text_bytes if each is None else self.most_prompt_tokens * each

    async def _encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, tokenizer: Tokenizer | None = None
    ) -> list[list[int]]:
        """See `EngineClient.tokenize`."""
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("the model has no tokenizer; send token ids, or start it with --tokenizer-path")
        return await tokenizing.encode(
            tokenizer,
            texts,
            most_tokens=self.most_prompt_tokens,
            max_bytes=self._limits.max_text_bytes,
            add_special_tokens=add_special_tokens,
        )

    async def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            (ids,) = await self._encode([prompt])
            return tuple(ids)
        try:
            self._check_length(prompt)
            await self._spread(len(prompt))
            return tuple(map(index, prompt))
        except TypeError:
            raise InvalidRequestError(f"a prompt must be text or token ids, not {prompt!r:.80}") from None

    async def _spread(self, tokens: int) -> None:
        """Begin long prompts in different turns of the event loop, which would else begin those of a batch in one."""
        if tokens > _SHORT_PROMPT:
            async with self._beginning:
                await asyncio.sleep(0)

    def _check_length(self, prompt: Sequence[int]) -> None:
        if hasattr(prompt, "__len__") and len(prompt) > self.most_prompt_tokens:
            raise InvalidRequestError(f"the prompt has {len(prompt)} tokens, the limit is {self.most_prompt_tokens}")

    async def _without_words(self, params: SamplingParams) -> SamplingParams:
        """The same with bad words as tokens: the engine would tokenize them between two steps."""
        tokenizer = self.tokenizer
        if not params.bad_words or tokenizer is None:
            return params

        def runs() -> list[list[int]]:
            return [run for word in params.bad_words for run in tokenizer.words_ids(word)]

        found = runs() if len(params.bad_words) <= _FEW_WORDS else await tokenizing.run(runs)
        return replace(params, bad_words=(), bad_words_ids=(*params.bad_words_ids, *found))

    def _next_number(self, priority: int) -> int:
        if priority < 0:
            raise InvalidRequestError(f"priority must be 0 (the default), 1 (the highest) or larger, got {priority}")
        self._numbers += 1
        return self._numbers

    def _prefixes(self, tokens: tuple[int, ...], params: SamplingParams, salt: str) -> tuple[int, ...]:
        """What decides between engines: nothing for one, or for a prompt that no engine takes from its cache."""
        cached = self.config.cache.enable_prefix_caching and params.prompt_logprobs is None
        return prefixes_of(tokens, self.info.block_size, salt) if cached and self._engines > 1 else ()


def attach(ticket: Ticket, params: SamplingParams | PoolingParams) -> None:
    """Let a request be one of the call that the running task works for."""
    if (call := current_call.get()) is not None:
        ticket.call, ticket.model, ticket.params = call, call.model, params


def _check_sizes(params: SamplingParams, vocab_size: int) -> None:
    """InvalidRequestError where parameters would make each token take long."""
    if params.n > _MOST_COMPLETIONS:
        raise InvalidRequestError(f"n must be at most {_MOST_COMPLETIONS}, got {params.n}")
    given = params.given()
    check_entries(given)
    for name in ("logprobs", "prompt_logprobs"):
        if min(count := given.get(name) or 0, vocab_size) > _MOST_LOGPROBS:
            raise InvalidRequestError(f"{name} must be at most {_MOST_LOGPROBS}, got {count}")
    for name in ("stop", "bad_words"):
        if words := given.get(name):
            check_words(name, words)


def _frame(message: Add) -> bytearray:
    """A request as it goes to an engine; InvalidRequestError where it has numbers or text that cannot."""
    try:
        return framed(message)
    except (OverflowError, ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be passed to the engine: {error}") from None


def _may_stop(params: SamplingParams) -> bool:
    """Whether anything but `max_tokens` may end a completion."""
    if not params.ignore_eos:
        return True
    return bool(params.stop or params.stop_token_ids or params.stop_words_ids or params.is_constrained) or (
        params.beam_width > 1
    )
