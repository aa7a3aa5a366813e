"""Methods of `LLM` for vectors, scores of labels and of pairs, and masks, under vLLM's names."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from hasten.core.errors import EngineError, InvalidRequestError
from hasten.core.types import (
    ClassificationOutput,
    EmbeddingOutput,
    FailedOutput,
    FillMaskOutput,
    PooledOutput,
    PoolingParams,
    PoolingRequestOutput,
    PoolingTask,
    Request,
    ScoringOutput,
)
from hasten.core.vllm_arguments import OF_SCORE, OF_TEXTS, with_accepted_names
from hasten.engine.engine import Engine
from hasten.engine.fill_mask import target_ids, with_texts
from hasten.engine.pooling import Pooler, generates_text
from hasten.engine.prompts import Prompt, given_prompts
from hasten.engine.request_state import Output
from hasten.engine.texts import Instruction, TextRequests, instruction, text_pairs


class PoolingMethods(ABC):
    """The methods of an `LLM` whose model gives vectors or scores.

    All of them raise InvalidRequestError where the model is for another task or a text cannot be served, and
    EngineError where one could not be computed; there are no results then. The first texts are computed while the next
    are tokenized and checked. For several texts a bar on standard error shows how far they are, if that is a terminal;
    `use_tqdm=False` does without.
    """

    _next_id: int
    """What the ids of the next requests count from."""

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The engine below."""

    @abstractmethod
    def _finished_texts(
        self, requests: Iterable[tuple[str, Request]], count: int, doing: str, *, show_progress: bool
    ) -> list[tuple[str, Output]]: ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of scores; none where the model does not classify."""
        classifier = self.engine.model_config.classifier
        return () if classifier is None else classifier.labels

    @with_accepted_names(OF_TEXTS)
    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """The vector of each text, or list of token ids: `outputs.embedding`, in the order of the prompts.

        `prompt` stands before each text, or the one that the model has under `prompt_name`, or its default.
        """
        params = _params("embed", pooling_params, truncate_prompt_tokens)
        outputs = self._pooled(prompts, params, use_tqdm=use_tqdm, prompt_name=prompt_name, prompt=prompt)
        return cast("list[PoolingRequestOutput[EmbeddingOutput]]", outputs)

    @with_accepted_names(OF_TEXTS)
    def classify(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[ClassificationOutput]]:
        """The scores of each text by label: `outputs.probs`, in the order of `labels`."""
        params = _params("classify", pooling_params, truncate_prompt_tokens)
        outputs = self._pooled(prompts, params, use_tqdm=use_tqdm)
        return cast("list[PoolingRequestOutput[ClassificationOutput]]", outputs)

    @with_accepted_names(OF_TEXTS)
    def encode(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: PoolingTask | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[Any]]:
        """What a model makes of each text for a task, by default its own.

        For `token_embed` and `token_classify` that is `outputs.data`, a tensor with a row for each token.
        """
        given = given_params(pooling_params)
        task = pooling_task or (self._pooler("encode").tasks[0] if given is None else given.task)
        params = _params(task, pooling_params, truncate_prompt_tokens)
        return self._pooled(prompts, params, use_tqdm=use_tqdm)

    def fill_mask(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        top_k: int | None = None,
        targets: str | Sequence[str | int] | None = None,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[FillMaskOutput]]:
        """The `top_k` most probable words of each mask of each text: `outputs.candidates`, a list for each mask.

        Without `top_k` they are as many as `pooling_params` says, which is 5 by default.
        A word has the names of transformers' pipeline: `score`, `token`, `token_str` and `sequence`. With `targets`,
        words or token ids, a mask gets the most probable of these; their scores are those among all words.
        """
        tokenizer = self.engine.tokenizer
        params = replace(given_params(pooling_params) or PoolingParams(), task="fill_mask")
        if top_k is not None:
            params = replace(params, top_k=top_k)
        self._pooler("fill_mask").check(params)
        if targets is not None:
            params = replace(params, targets=target_ids(tokenizer, targets))
        params = _params("fill_mask", params, truncate_prompt_tokens)
        outputs = cast("list[PoolingRequestOutput[FillMaskOutput]]", self._pooled(prompts, params, use_tqdm=use_tqdm))
        assert tokenizer is not None, "no mask would be known, and a text without one is refused"
        for output in outputs:
            found = output.outputs
            found.candidates = with_texts(tokenizer, output.prompt_token_ids, found.candidates)
        return outputs

    @with_accepted_names(OF_SCORE)
    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How well each document answers its query: `outputs.score`. One query stands for all documents.

        A cross-encoder reads both texts together; of a model that gives vectors, it is their cosine.
        """
        pairs = text_pairs(queries, documents)
        pooler = self._pooler("score")
        if "embed" in pooler.tasks:
            return self._cosines(pairs, truncate_prompt_tokens, use_tqdm=use_tqdm)
        params = _params("score", None, truncate_prompt_tokens)
        pooler.check(params)
        with _uncollected():
            requests = self._requests().of_pairs(pairs, params)
            outputs = self._outputs(requests, len(pairs), "scoring", use_tqdm=use_tqdm)
        return cast("list[PoolingRequestOutput[ScoringOutput]]", outputs)

    def _cosines(
        self, pairs: Sequence[tuple[str, str]], truncate: int | None, *, use_tqdm: bool
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        params = PoolingParams(normalize=True, truncate_prompt_tokens=truncate)
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        outputs = self.embed(texts, pooling_params=params, prompt="", use_tqdm=use_tqdm)
        found = dict(zip(texts, outputs, strict=True))

        def scored(first: str, second: str) -> PoolingRequestOutput[ScoringOutput]:
            left, right = found[first], found[second]
            products = (a * b for a, b in zip(left.outputs.embedding, right.outputs.embedding, strict=True))
            ids = left.prompt_token_ids + right.prompt_token_ids
            return PoolingRequestOutput(right.request_id, None, ids, ScoringOutput(sum(products)))

        return [scored(*pair) for pair in pairs]

    def _pooler(self, method: str) -> Pooler:
        engine = self.engine
        if engine.worker.pooler is None:
            raise generates_text(method, engine.model_config.architecture)
        return engine.worker.pooler

    def _requests(self) -> TextRequests:
        engine = self.engine
        return TextRequests(self._pooler("encode").pooling.texts, engine.tokenizer, engine.max_model_len, self._next_id)

    def _pooled(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: PoolingParams,
        *,
        use_tqdm: bool,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[PoolingRequestOutput[PooledOutput]]:
        pooler = self._pooler(params.task)
        pooler.check(params)
        before = instruction(pooler.pooling.texts, prompt, prompt_name) if params.task == "embed" else Instruction()
        with _uncollected():
            given = given_prompts(prompts)
            requests = self._requests().of_prompts(given, params, before)
            return self._outputs(requests, len(given), "encoding", use_tqdm=use_tqdm)

    def _outputs(
        self, requests: Iterable[tuple[str, Request]], count: int, doing: str, *, use_tqdm: bool
    ) -> list[PoolingRequestOutput[PooledOutput]]:
        pooled: list[PoolingRequestOutput[PooledOutput]] = []
        for where, output in self._finished_texts(requests, count, doing, show_progress=use_tqdm):
            assert isinstance(output, PoolingRequestOutput)
            if isinstance(output.outputs, FailedOutput):
                raise EngineError(f"{where}: {output.outputs.error}")
            pooled.append(output)
        return pooled


@contextmanager
def _uncollected() -> Iterator[None]:
    """A block without collections of garbage.

    They look at each token id that the caller has, for longer than a GPU has work, and nothing here is garbage. What is
    left of the block is looked at once, by itself, which is soon done: else it would lead to a whole collection.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.collect(1)
            gc.enable()


def given_params(params: PoolingParams | None) -> PoolingParams | None:
    """What a caller gives as `pooling_params`; InvalidRequestError where it is something else."""
    if params is not None and not isinstance(params, PoolingParams):
        raise InvalidRequestError(f"pooling_params must be PoolingParams, the same for all texts; got {params!r:.80}")
    return params


def _params(task: PoolingTask, params: PoolingParams | None, truncate: int | None) -> PoolingParams:
    """Parameters of a method's task, with what its own argument says."""
    params = replace(given_params(params) or PoolingParams(), task=task)
    return params if truncate is None else replace(params, truncate_prompt_tokens=truncate)
