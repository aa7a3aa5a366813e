"""Requests for vectors and scores as they come in: OpenAI's, vLLM's, Cohere's and Jina's fields. Others are refused."""

from typing import Any

import msgspec

from hasten.core.errors import InvalidRequestError
from hasten.core.types import PoolingParams, PoolingTask
from hasten.engine.fill_mask import target_ids
from hasten.engine.text import Tokenizer
from hasten.server.openai.types import Prompts, each_prompt

_MOST_TEXTS = 2048
"""Of a request; OpenAI's own limit."""


class TextsRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all of them have in common; `null` stands for a field that is left out."""

    model: str | None = None
    """The server's only one that makes vectors or scores, where it is left out."""
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    """As everywhere in this server: 1 is the highest, larger ones come later, 0 is the default, between 1 and 2."""
    user: str | None = None
    """Without effect: nothing here depends on who asks."""


class InputRequest(TextsRequest, kw_only=True):
    """A request with texts that do not belong together."""

    input: Prompts

    def prompts(self) -> list[str | list[int]]:
        """Each text, or its token ids; InvalidRequestError where they are mixed up, too many, or none."""
        prompts = each_prompt("input", self.input)
        check_count("input", len(prompts))
        return prompts


class EmbeddingRequest(InputRequest, kw_only=True):
    """POST /v1/embeddings."""

    encoding_format: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    prompt_name: str | None = None
    """The model's own prompt that stands before each text."""

    def params(self) -> PoolingParams:
        """What to make of each text."""
        truncate = self.truncate_prompt_tokens
        return PoolingParams(dimensions=self.dimensions, normalize=self.normalize, truncate_prompt_tokens=truncate)


class ActivationRequest(InputRequest, kw_only=True):
    """What requests for scores have in common."""

    activation: bool | None = None
    use_activation: bool | None = None
    softmax: bool | None = None
    """Both are vLLM's other names of `activation`."""

    @property
    def activates(self) -> bool:
        """Whether scores are probabilities: the first of the three that is given, or else they are."""
        given = (self.activation, self.use_activation, self.softmax)
        return next((value for value in given if value is not None), True)


class PoolingRequest(ActivationRequest, kw_only=True):
    """POST /pooling."""

    task: PoolingTask | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    top_k: int | None = None
    """How many words each mask gets, by default 5; for the task fill_mask alone, like `targets`."""
    targets: str | list[str | int] | None = None
    """Words or token ids, of which a mask gets the most probable."""

    def params(self, task: PoolingTask, tokenizer: Tokenizer | None) -> PoolingParams:
        """What to make of each text; `task`: where the request names none; `tokenizer`: that of its `targets`."""
        return PoolingParams(
            task=self.task or task,
            dimensions=self.dimensions,
            normalize=self.normalize,
            activation=self.activates,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            **self._of_masks(tokenizer),
        )

    def _of_masks(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        found: dict[str, Any] = {} if self.top_k is None else {"top_k": self.top_k}
        if self.targets is not None:
            found["targets"] = target_ids(tokenizer, self.targets)
        if found and self.task != "fill_mask":
            raise InvalidRequestError(f"{', '.join(found)}: for masks alone; give the task fill_mask")
        return found


class ClassifyRequest(ActivationRequest, kw_only=True):
    """POST /classify."""

    def params(self) -> PoolingParams:
        """What to make of each text."""
        truncate = self.truncate_prompt_tokens
        return PoolingParams(task="classify", activation=self.activates, truncate_prompt_tokens=truncate)


class ScoreRequest(TextsRequest, kw_only=True):
    """POST /score and /v1/score."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    """vLLM's later names of the two."""

    def pairs(self) -> list[tuple[str, str]]:
        """Each query with its document; one query stands for all documents."""
        first = _list("text_1", "queries", self.text_1, self.queries)
        second = _list("text_2", "documents", self.text_2, self.documents)
        if len(first) == 1:
            first *= len(second)
        if len(first) != len(second):
            raise InvalidRequestError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}; give one query, or one for each document"
            )
        return list(zip(first, second, strict=True))


def _list(name: str, other_name: str, given: str | list[str] | None, other: str | list[str] | None) -> list[str]:
    if (given is None) == (other is None):
        raise InvalidRequestError(f"{name} is missing" if given is None else f"give {name} or {other_name}, not both")
    texts = other if given is None else given
    assert texts is not None
    if isinstance(texts, str):
        return [texts]
    check_count(name, len(texts))
    return texts


class RerankRequest(TextsRequest, kw_only=True):
    """POST /rerank, /v1/rerank and /v2/rerank."""

    query: str
    documents: list[str | dict[str, Any]]
    """Texts, or objects whose `text` is one."""
    top_n: int | None = None
    return_documents: bool | None = None

    def texts(self) -> list[str]:
        """The text of each document; InvalidRequestError where one has none, or they are too many."""
        check_count("documents", len(self.documents))
        if self.top_n is not None and self.top_n < 1:
            raise InvalidRequestError(f"top_n must be at least 1, got {self.top_n}")
        return [_text(number, document) for number, document in enumerate(self.documents)]


def _text(number: int, document: str | dict[str, Any]) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"documents[{number}] has no text; give a text, or an object with one as its 'text'")
    return text


def check_count(name: str, count: int) -> None:
    """InvalidRequestError where a request has no texts, or too many."""
    if not count:
        raise InvalidRequestError(f"{name} is empty")
    if count > _MOST_TEXTS:
        raise InvalidRequestError(f"{name} has {count} texts, the limit is {_MOST_TEXTS}; send several requests")
