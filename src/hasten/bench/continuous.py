"""Hugging Face's continuous batching over a paged cache: what its `generate_batch` runs."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hasten.bench.engines import GREEDY, Generation, HuggingFaceEngine, clock, in_batches, num_threads
from hasten.core.errors import EngineError, UnsupportedError
from hasten.core.types import SamplingParams

_PAGE = 256
"""Tokens of a page of transformers' cache."""
_MAX_TOKENS = 8192
"""Tokens of a step, transformers' default."""


class ContinuousEngine:
    """The model of a `HuggingFaceEngine`, with requests that join and leave its batch as they begin and end.

    Each request has its own length, which `generate_batch` itself does not offer. The cache has room for all requests
    of a call; it is allocated untimed, and no prefixes are shared, as in hasten's engine.
    """

    label = "HF generate_batch"

    def __init__(
        self, hugging_face: HuggingFaceEngine, sampling: SamplingParams = GREEDY, batch_size: int | None = None
    ) -> None:
        """UnsupportedError if the model or the sampling cannot be run so."""
        self._of = hugging_face
        self.device, self.dtype = hugging_face.device, hugging_face.dtype
        self._batch_size = batch_size
        reason = _unsupported(hugging_face, sampling)
        if reason is not None:
            raise UnsupportedError(reason)
        self._room = (0, 0)
        """Pages of the cache, and tokens of a step."""
        self._manager: Any = None

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        """Continue each prompt by exactly its length."""
        with num_threads(self._of.threads), _quiet():
            return in_batches(self._generate_batch, prompts, lengths, self._batch_size)

    @torch.no_grad()
    def _generate_batch(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        manager = self._manager_of(prompts, lengths)
        start = clock(self.device)
        manager.switch_to_cb_friendly_attn(self._of.model)
        manager.start()
        try:
            pairs = zip(prompts, lengths, strict=True)
            ids = [manager.add_request(list(prompt), max_new_tokens=length) for prompt, length in pairs]
            tokens = _results(manager, ids)
            seconds = clock(self.device) - start
        finally:
            manager.stop(keep_for_next_session=True)
        return Generation([tokens[each] for each in ids], seconds)

    def _manager_of(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Any:
        """A manager with room for these requests; the last one, if it has that."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        pages = 1 + sum(-(-(len(prompt) + length) // _PAGE) for prompt, length in zip(prompts, lengths, strict=True))
        room = (pages, min(_MAX_TOKENS, sum(map(len, prompts))))
        if self._manager is None or any(need > have for need, have in zip(room, self._room, strict=True)):
            self._of.model.destroy_cached_continuous_batching_manager()
            self._room = pages, tokens = max(room[0], self._room[0]), max(room[1], self._room[1])
            # no request ends before its length
            options = {**self._of.options, "eos_token_id": -1}
            # transformers 5.17 has another name for it
            page = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
            config = ContinuousBatchingConfig(
                **{page: _PAGE}, num_blocks=pages, max_batch_tokens=tokens, allow_block_sharing=False
            )
            self._manager = self._of.model.init_continuous_batching(GenerationConfig(**options), config)
            self._manager.warmup()
        return self._manager


def _unsupported(hugging_face: HuggingFaceEngine, sampling: SamplingParams) -> str | None:
    model = hugging_face.model
    if not hasattr(model, "init_continuous_batching"):
        return "this version of transformers has no continuous batching for the model"
    if hugging_face.has_encoder:
        return "it runs no encoders"
    if sampling.beam_width > 1 or sampling.repetition_penalty != 1:
        return "it has no beams, and penalizes repetition in another way than generate"
    if not type(model)._can_set_attn_implementation():
        return f"{type(model).__name__}'s attention in transformers reads no paged cache: its answers would be wrong"
    return None


def _results(manager: Any, ids: Sequence[str]) -> dict[str, list[int]]:
    """New tokens of each request."""
    tokens: dict[str, list[int]] = {}
    while len(tokens) < len(ids):
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise EngineError("its thread ended before all requests did")
        elif output.error is not None:
            raise EngineError(f"a request failed: {output.error}")
        elif output.is_finished():
            tokens[output.request_id] = list(output.generated_tokens)
    return tokens


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' log of continuous batching, which would stand among the results."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
