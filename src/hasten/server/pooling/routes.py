"""Routes for vectors and scores of texts: OpenAI's embeddings, vLLM's score, pooling and classify, Cohere's rerank."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.engine.texts import instruction
from hasten.server.by_size import by_size
from hasten.server.openai.handlers import checked_wait, guarded, json_response, read_body
from hasten.server.openai.models import Found, ModelFinder
from hasten.server.openai.params import Decoded
from hasten.server.openapi.operation import Operation
from hasten.server.pooling import answers
from hasten.server.pooling.call import PoolingCall, Result
from hasten.server.pooling.types import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
    TextsRequest,
)
from hasten.server.sse import unless_gone

_EMBED, _POOL = msgspec.json.Decoder(EmbeddingRequest), msgspec.json.Decoder(PoolingRequest)
_CLASSIFY, _SCORE = msgspec.json.Decoder(ClassifyRequest), msgspec.json.Decoder(ScoreRequest)
_RERANK = msgspec.json.Decoder(RerankRequest)
_RANK = "Documents by how well they answer a query"
_NUMBER_BYTES = 20
"""Of JSON."""

Answer = Callable[[Decoded, str, PoolingCall], Coroutine[Any, Any, bytes]]


def pooling_routes(models: ModelFinder) -> list[Route]:
    """The routes, all of them POST."""

    def route(path: str, summary: str, decoder: msgspec.json.Decoder[Decoded], answer: Answer[Decoded]) -> Route:
        async def handler(request: Request) -> Response:
            body = await read_body(request, decoder)
            assert isinstance(body, TextsRequest), "all of these are"
            found = models.find_pooler(body.model)
            call = _call(request, body, found)
            return json_response(await unless_gone(request, answer(body, found.name, call)))

        return Route(path, guarded(handler, Operation(summary, decoder.type)), methods=["POST"])

    return [
        route("/v1/embeddings", "Vectors of texts", _EMBED, _embeddings),
        route(
            "/pooling",
            "Vectors or scores of texts, or of each of their tokens, or words for their masks",
            _POOL,
            _pooling,
        ),
        route("/classify", "Classes of texts", _CLASSIFY, _classify),
        *(route(path, "Scores of pairs of texts", _SCORE, _score) for path in ("/score", "/v1/score")),
        # Cohere's second version has no documents in its answers
        *(route(path, _RANK, _RERANK, partial(_rerank, with_documents=True)) for path in ("/rerank", "/v1/rerank")),
        route("/v2/rerank", _RANK, _RERANK, partial(_rerank, with_documents=False)),
    ]


def _call(request: Request, body: TextsRequest, found: Found) -> PoolingCall:
    timeout = checked_wait(request, body.priority, found.client)
    return PoolingCall(found.client, priority=body.priority or 0, queue_timeout=timeout, tally=found.tally)


def _size(results: list[Result]) -> int:
    return _NUMBER_BYTES * sum(result.numbers.size for result in results)


async def _embeddings(body: EmbeddingRequest, model: str, call: PoolingCall) -> bytes:
    form, params, prompts = answers.number_form(body.encoding_format), body.params(), body.prompts()
    before = instruction(call.info.texts, None, body.prompt_name)
    results = await call.prompts(prompts, params, before)
    return await by_size(_size(results), answers.listed, "embd", model, answers.embeddings(results, form), call.usage)


async def _pooling(body: PoolingRequest, model: str, call: PoolingCall) -> bytes:
    form, prompts = answers.number_form(body.encoding_format), body.prompts()
    tokenizer = call.client.tokenizer
    params = body.params(call.info.tasks[0], tokenizer)
    before = instruction(call.info.texts, None, None) if params.task == "embed" else None
    results = await call.prompts(prompts, params, before)
    size, entries = _size(results), answers.pooled(results, form)
    if params.task == "fill_mask":
        assert tokenizer is not None, "no mask would be known, and a text without one is refused"
        size *= 1 + max(len(result.prompt_token_ids) for result in results)
        entries = answers.filled(results, tokenizer)
    return await by_size(size, answers.listed, "pool", model, entries, call.usage)


async def _classify(body: ClassifyRequest, model: str, call: PoolingCall) -> bytes:
    results = await call.prompts(body.prompts(), body.params())
    entries = answers.classes(results, call.info.labels)
    return await by_size(_size(results), answers.listed, "classify", model, entries, call.usage)


async def _score(body: ScoreRequest, model: str, call: PoolingCall) -> bytes:
    found = await call.scores(body.pairs(), body.truncate_prompt_tokens, "documents")
    return answers.listed("score", model, answers.scores(found), call.usage)


async def _rerank(body: RerankRequest, model: str, call: PoolingCall, *, with_documents: bool) -> bytes:
    texts = body.texts()
    found = await call.scores([(body.query, text) for text in texts], body.truncate_prompt_tokens, "documents")
    shows = with_documents if body.return_documents is None else body.return_documents
    return answers.ranking(model, found, call.usage, body.top_n, texts if shows else None)
