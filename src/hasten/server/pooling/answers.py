"""The JSON of answers with vectors and scores, in the forms of OpenAI, vLLM, Cohere and Jina."""

import base64
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from hasten.core.types import FilledMask
from hasten.engine.fill_mask import with_texts
from hasten.engine.text import Tokenizer
from hasten.server.openai.answer import Usage
from hasten.server.openai.params import OpenAIError
from hasten.server.pooling.call import Numbers, Result

_encode = msgspec.json.Encoder().encode
Form = Callable[[Numbers], Any]


def number_form(encoding_format: str | None) -> Form:
    """How an answer has its numbers; OpenAIError for a format that there is not."""
    if encoding_format in (None, "float"):
        return lambda numbers: numbers.tolist()
    if encoding_format == "base64":
        return lambda numbers: base64.b64encode(numbers.astype("<f4", copy=False).tobytes()).decode()
    message = f"encoding_format must be float or base64, got {encoding_format!r:.80}"
    raise OpenAIError(message, param="encoding_format")


def listed(prefix: str, model: str, entries: Iterable[dict[str, Any]], usage: Usage) -> bytes:
    """A list of entries, encoded one by one, so that other threads run between them."""
    head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": model}
    data = b",".join(map(_encode, entries))
    return _encode(head)[:-1] + b',"data":[' + data + b'],"usage":' + _encode(usage.as_json()) + b"}"


def embeddings(results: Sequence[Result], form: Form) -> Iterable[dict[str, Any]]:
    """Entries of /v1/embeddings."""
    for index, result in enumerate(results):
        yield {"object": "embedding", "index": index, "embedding": form(result.numbers)}


def pooled(results: Sequence[Result], form: Form) -> Iterable[dict[str, Any]]:
    """Entries of /pooling."""
    for index, result in enumerate(results):
        yield {"object": "pooling", "index": index, "data": form(result.numbers)}


def filled(results: Sequence[Result], tokenizer: Tokenizer) -> Iterable[dict[str, Any]]:
    """Entries of /pooling with words for masks: for each mask a list of them, as transformers' pipeline has it."""
    for index, result in enumerate(results):
        ids_mk, scores_mk = np.split(result.numbers, 2, axis=1)
        candidates = [
            [FilledMask(score, int(token)) for token, score in zip(ids_k.tolist(), scores_k.tolist(), strict=True)]
            for ids_k, scores_k in zip(ids_mk, scores_mk, strict=True)
        ]
        yield {"object": "pooling", "index": index, "data": with_texts(tokenizer, result.prompt_token_ids, candidates)}


def classes(results: Sequence[Result], labels: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Entries of /classify."""
    for index, result in enumerate(results):
        label = labels[int(result.numbers.argmax())]
        yield {"index": index, "label": label, "probs": result.numbers.tolist(), "num_classes": len(labels)}


def scores(found: Sequence[float]) -> Iterable[dict[str, Any]]:
    """Entries of /score."""
    return ({"object": "score", "index": index, "score": score} for index, score in enumerate(found))


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
