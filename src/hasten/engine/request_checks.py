"""Requests checked against the model and the cache before anything is queued."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import InvalidRequestError
from hasten.core.model_config import ModelConfig
from hasten.core.types import PoolingParams, Request, SamplingParams
from hasten.engine.beam import candidate_count, end_tokens
from hasten.engine.fill_mask import no_mask
from hasten.engine.pooling import Pooler, generates_text, truncated
from hasten.engine.text import Tokenizer
from hasten.engine.text_scheduler import as_ids

_BEYOND_ANY = np.array([-1], dtype=np.int32)
"""In place of token ids of which one does not fit."""
_CACHED_WORDS = 1024
"""Bad words whose tokens are cached: most requests of a program ban the same words."""


@dataclass(frozen=True)
class RequestLimits:
    """What an engine can take of one request."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int


class RequestChecks:
    """Whether one engine can serve a request, and the request as it will be served."""

    def __init__(
        self, model: ModelConfig, limits: RequestLimits, tokenizer: Tokenizer | None, pooler: Pooler | None
    ) -> None:
        self._model, self._limits, self._tokenizer, self._pooler = model, limits, tokenizer, pooler
        self._words_ids = None if tokenizer is None else lru_cache(_CACHED_WORDS)(tokenizer.words_ids)

    def sampling_params(self, request: Request) -> SamplingParams:
        """A request's parameters, its bad words turned into tokens; InvalidRequestError where it cannot be served."""
        params, prompt = request.params, request.prompt_token_ids
        name = f"request {request.request_id}"
        if not prompt:
            raise InvalidRequestError(f"{name}: the prompt has no tokens")
        if self._model.encoder is not None:
            self._check_encoder_input(name, params, len(prompt))
        elif len(prompt) >= self._limits.max_model_len:
            raise InvalidRequestError(
                f"{name}: the prompt has {len(prompt)} tokens; with at least one to come, "
                f"more than the longest sequence of {self._limits.max_model_len} (max_model_len)"
            )
        named = {"the prompt": prompt, "stop_token_ids": params.stop_token_ids}
        named |= {"stop_words_ids": tuple(itertools.chain(*params.stop_words_ids))}
        named |= {"bad_words_ids": tuple(itertools.chain(*params.bad_words_ids))}
        named |= {"logit_bias": tuple(params.logit_bias), "allowed_token_ids": params.allowed_token_ids}
        for where, ids in named.items():
            self._check_vocabulary(name, where, ids)
        if self._words_ids is None and (params.stop or params.bad_words):
            raise InvalidRequestError(f"{name}: stop strings and bad words need a tokenizer; give --tokenizer-path")
        if params.beam_width > 1:
            self._check_beams(name, params, len(prompt))
        if not params.bad_words:
            return params
        assert self._words_ids is not None, "refused above"
        runs = [run for word in params.bad_words for run in self._words_ids(word)]
        # what has tokens that the model lacks cannot be produced anyway
        runs = [run for run in runs if max(run) < self._model.vocab_size]
        return replace(params, bad_words=(), bad_words_ids=(*params.bad_words_ids, *runs))

    def pooled(self, request: Request) -> tuple[Request, NDArray[np.int32]]:
        """A request for a vector or scores, truncated as it asks, and its token ids; errors as of `sampling_params`."""
        name, params, architecture = f"request {request.request_id}", request.pooling, self._model.architecture
        if self._pooler is None:
            raise generates_text(name, architecture)
        if params is None:
            tasks = ", ".join(self._pooler.tasks)
            raise InvalidRequestError(f"{name}: {architecture} generates no text; it does {tasks}")
        self._pooler.check(params)
        request = truncated(request, self._limits.max_model_len)
        ids = self._checked_ids(name, request)
        if params.task == "fill_mask":
            self._check_masks(name, request, params)
        return request, ids

    def _check_masks(self, name: str, request: Request, params: PoolingParams) -> None:
        ids, vocab = request.prompt_token_ids, self._model.vocab_size
        if not request.masks:
            raise InvalidRequestError(f"{name}: {no_mask(self._tokenizer)}")
        if not all(0 <= position < len(ids) for position in request.masks):
            raise InvalidRequestError(f"{name}: masks {request.masks!r:.80} are not all places of {len(ids)} tokens")
        self._check_vocabulary(name, "targets", params.targets)
        if params.top_k > vocab:
            raise InvalidRequestError(f"{name}: top_k is {params.top_k}; the vocabulary has {vocab}")

    def _checked_ids(self, name: str, request: Request) -> NDArray[np.int32]:
        ids, types, model = request.prompt_token_ids, request.token_type_ids, self._model
        if not ids:
            raise InvalidRequestError(f"{name}: the text has no tokens")
        if len(ids) > self._limits.max_model_len:
            raise InvalidRequestError(
                f"{name}: the text has {len(ids)} tokens, more than the longest of {self._limits.max_model_len} "
                "(max_model_len); shorten it, or let truncate_prompt_tokens do so"
            )
        try:
            found = as_ids(ids)
        except OverflowError:
            found = _BEYOND_ANY
        if found.min() < 0 or found.max() >= model.vocab_size:
            self._check_vocabulary(name, "the text", ids)
        if types and len(types) != len(ids):
            raise InvalidRequestError(f"{name}: {len(types)} token_type_ids for {len(ids)} tokens")
        if types and model.token_types and not 0 <= min(types) <= max(types) < model.token_types:
            raise InvalidRequestError(f"{name}: token_type_ids must be below {model.token_types}, got {max(types)}")
        return found

    def _check_vocabulary(self, name: str, where: str, ids: Collection[int]) -> None:
        vocab = self._model.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise InvalidRequestError(f"{name}: {where} has token id {wrong}; the vocabulary ends at {vocab - 1}")

    def _check_encoder_input(self, name: str, params: SamplingParams, length: int) -> None:
        """Whether an encoder can compute a prompt of this length, which it does in one step."""
        limits = self._limits
        longest, whole = limits.max_model_len, limits.max_num_batched_tokens
        option, most = min(("max_model_len", longest), ("max_num_batched_tokens", whole), key=itemgetter(1))
        if length > most:
            raise InvalidRequestError(
                f"{name}: the prompt has {length} tokens; the encoder takes {most} at the most ({option})"
            )
        if params.is_constrained and self._model.forced_bos_token_id is not None:
            raise InvalidRequestError(
                f"{name}: every output of this {self._model.architecture} begins with token "
                f"{self._model.forced_bos_token_id} (forced_bos_token_id), which no grammar knows"
            )
        if params.prompt_logprobs is not None:
            raise InvalidRequestError(
                f"{name}: prompt_logprobs are of models that continue their prompts; "
                f"{self._model.architecture} has an encoder for them"
            )

    def _check_beams(self, name: str, params: SamplingParams, prompt_len: int) -> None:
        """Whether all beams of a request can run together, which they must."""
        width, limits, vocab = params.beam_width, self._limits, self._model.vocab_size
        most = limits.max_num_seqs
        if width > most:
            raise InvalidRequestError(
                f"{name}: beam_width is {width}; more than {most} sequences at once (max_num_seqs)"
            )
        needed = candidate_count(params, self._model.eos_token_ids)
        if needed > vocab:
            raise InvalidRequestError(
                f"{name}: beam_width is {width}; it chooses among {needed} tokens, but the vocabulary has {vocab}"
            )
        going_on = len(set(params.allowed_token_ids) - end_tokens(params, self._model.eos_token_ids))
        if params.allowed_token_ids and going_on < width:
            raise InvalidRequestError(
                f"{name}: beam_width is {width}; allowed_token_ids has {going_on} tokens that do not end the output"
            )
        of_input = 0
        if self._model.encoder is not None:
            of_input, prompt_len = -(-prompt_len // limits.block_size), 1
        longest = params.max_length(prompt_len, limits.max_model_len)
        shared = prompt_len // limits.block_size
        needed = of_input + shared + width * (-(-longest // limits.block_size) - shared)
        if needed > limits.num_blocks:
            raise InvalidRequestError(
                f"{name}: {width} beams of {longest} tokens may need {needed} cache blocks, but there are "
                f"{limits.num_blocks}; lower beam_width or max_tokens, or give the cache more memory (kv_cache_memory)"
            )
