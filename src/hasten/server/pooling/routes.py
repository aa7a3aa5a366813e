"""Routes for vectors and scores of texts: OpenAI's embeddings, vLLM's score, pooling and classify, Cohere's rerank.

Answers are in the forms of OpenAI, vLLM, Cohere and Jina.
"""

import base64
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.types import FilledMask
from hasten.engine.fill_mask import with_texts
from hasten.engine.text import Tokenizer
from hasten.engine.texts import instruction
from hasten.server.by_size import by_size
from hasten.server.openai.answer import Usage
from hasten.server.openai.handling import api_route, checked_queueing, json_response
from hasten.server.openai.models import ModelFinder
from hasten.server.openai.params import OpenAIError
from hasten.server.pooling.call import Numbers, PoolingCall, Result
from hasten.server.pooling.types import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
    TextsRequest,
)
from hasten.server.sse import unless_gone

_encode = msgspec.json.Encoder().encode
Item = TypeVar("Item")
NumberForm = Callable[[Numbers], Any]


def number_form(encoding_format: str | None) -> NumberForm:
    """How an answer has its numbers; OpenAIError for a format that there is not."""
    if encoding_format in (None, "float"):
        return lambda numbers: numbers.tolist()
    if encoding_format == "base64":
        return lambda numbers: base64.b64encode(numbers.astype("<f4", copy=False).tobytes()).decode()
    message = f"encoding_format must be float or base64, got {encoding_format!r:.80}"
    raise OpenAIError(message, param="encoding_format")


async def listed(
    prefix: str,
    model: str,
    call: PoolingCall,
    items: Sequence[Item],
    entry: Callable[[Item], Any],
    size: int,
) -> bytes:
    """A list of each item's entry, about `size` bytes; entries are encoded one by one, so that other threads run."""
    head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": model}

    def encoded() -> bytes:
        data = b",".join(_encode({"index": index, **entry(item)}) for index, item in enumerate(items))
        return _encode(head)[:-1] + b',"data":[' + data + b'],"usage":' + _encode(call.usage.as_json()) + b"}"

    return await by_size(size, encoded)


def words(result: Result, tokenizer: Tokenizer) -> list[list[FilledMask]]:
    """Words for each mask of a text, as transformers' pipeline has them."""
    ids_mk, scores_mk = np.split(result.numbers, 2, axis=1)
    candidates = [
        [FilledMask(score, int(token)) for token, score in zip(ids_k.tolist(), scores_k.tolist(), strict=True)]
        for ids_k, scores_k in zip(ids_mk, scores_mk, strict=True)
    ]
    return with_texts(tokenizer, result.prompt_token_ids, candidates)


def ranking(
    model: str, found: Sequence[float], usage: Usage, top_n: int | None, documents: Sequence[str] | None
) -> bytes:
    """The answer of /rerank: the best first, equal ones in the order in which they came."""
    order = sorted(range(len(found)), key=lambda index: -found[index])[:top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": found[index]} for index in order]
    if documents is not None:
        results = [{**entry, "document": {"text": documents[entry["index"]]}} for entry in results]
    return _encode(
        {
            "id": f"rerank-{secrets.token_hex(12)}",
            "object": "list",
            "model": model,
            "usage": usage.as_json(),
            "results": results,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }
    )


_POOL = "Vectors or scores of texts, or of each of their tokens, or words for their masks"
_RANK = "Documents by how well they answer a query"
_NUMBER_BYTES = 20
"""Of JSON."""

Texts = TypeVar("Texts", bound=TextsRequest)
Answer = Callable[[Texts, str, PoolingCall], Coroutine[Any, Any, bytes]]


def pooling_routes(models: ModelFinder) -> list[Route]:
    """The routes, all of them POST."""

    def route(path: str, summary: str, kind: type[Texts], answer: Answer[Texts]) -> Route:
        async def handler(request: Request, body: Texts) -> Response:
            found = models.find_pooler(body.model)
            queueing = checked_queueing(request, found.client, body.priority)
            call = PoolingCall(found.client, queueing, tally=found.tally)
            return json_response(await unless_gone(request.scope, answer(body, found.name, call)))

        return api_route(path, summary, kind, handler)

    ranked, unshown = partial(_rerank, with_documents=True), partial(_rerank, with_documents=False)
    return [
        route("/v1/embeddings", "Vectors of texts", EmbeddingRequest, _embeddings),
        route("/pooling", _POOL, PoolingRequest, _pooling),
        route("/classify", "Classes of texts", ClassifyRequest, _classify),
        *(route(path, "Scores of pairs of texts", ScoreRequest, _score) for path in ("/score", "/v1/score")),
        *(route(path, _RANK, RerankRequest, ranked) for path in ("/rerank", "/v1/rerank")),
        route("/v2/rerank", _RANK, RerankRequest, unshown),  # Cohere's second version has no documents in its answers
    ]


def _size(results: list[Result]) -> int:
    return _NUMBER_BYTES * sum(result.numbers.size for result in results)


async def _embeddings(body: EmbeddingRequest, model: str, call: PoolingCall) -> bytes:
    form, params, prompts = number_form(body.encoding_format), body.params(), body.prompts()
    results = await call.prompts(prompts, params, instruction(call.info.texts, None, body.prompt_name))

    def entry(result: Result) -> dict[str, Any]:
        return {"object": "embedding", "embedding": form(result.numbers)}

    return await listed("embd", model, call, results, entry, _size(results))


async def _pooling(body: PoolingRequest, model: str, call: PoolingCall) -> bytes:
    form, prompts = number_form(body.encoding_format), body.prompts()
    tokenizer = call.client.tokenizer
    params = body.params(call.info.tasks[0], tokenizer)
    before = instruction(call.info.texts, None, None) if params.task == "embed" else None
    results = await call.prompts(prompts, params, before)
    of_masks, size = params.task == "fill_mask", _size(results)
    if of_masks:
        size *= 1 + max(len(result.prompt_token_ids) for result in results)

    def entry(result: Result) -> dict[str, Any]:
        if not of_masks:
            return {"object": "pooling", "data": form(result.numbers)}
        assert tokenizer is not None, "no mask would be known, and a text without one is refused"
        return {"object": "pooling", "data": words(result, tokenizer)}

    return await listed("pool", model, call, results, entry, size)


async def _classify(body: ClassifyRequest, model: str, call: PoolingCall) -> bytes:
    results, labels = await call.prompts(body.prompts(), body.params()), call.info.labels

    def entry(result: Result) -> dict[str, Any]:
        label = labels[int(result.numbers.argmax())]
        return {"label": label, "probs": result.numbers.tolist(), "num_classes": len(labels)}

    return await listed("classify", model, call, results, entry, _size(results))


async def _score(body: ScoreRequest, model: str, call: PoolingCall) -> bytes:
    found = await call.scores(body.pairs(), body.truncate_prompt_tokens, "documents")
    return await listed("score", model, call, found, lambda score: {"object": "score", "score": score}, 0)


async def _rerank(body: RerankRequest, model: str, call: PoolingCall, *, with_documents: bool) -> bytes:
    texts = body.texts()
    found = await call.scores([(body.query, text) for text in texts], body.truncate_prompt_tokens, "documents")
    shows = with_documents if body.return_documents is None else body.return_documents
    return ranking(model, found, call.usage, body.top_n, texts if shows else None)
