"""Malformed requests for vectors, scores and tokens of texts, by chance and by hand."""

import json
import random
from typing import Any

from tests.soak.asks import TEXT
from tests.soak.attacks import HttpAttack, posted
from tests.soak.http_client import request

VECTORS, VECTOR_TOKENS = "tiny", "tiny-ids"
_EMBEDDING = {"model": VECTORS, "input": ["the garden", "a dog"], "encoding_format": "float", "normalize": True}
_POOLING = {"model": VECTORS, "input": [[5, 6, 7], [8]], "task": "embed", "truncate_prompt_tokens": 2, "priority": 1}
_SCORE = {"model": VECTORS, "text_1": "the garden", "text_2": ["a dog", "a cat"], "truncate_prompt_tokens": -1}
_RERANK = {"model": VECTORS, "query": "the", "documents": ["a dog", {"text": "a cat"}], "top_n": 1}
_TEXTS = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["the garden", "a dog"]}]}
_IDS = {
    "inputs": [
        {"name": "input_ids", "datatype": "UINT32", "shape": [2, 2], "data": [5, 6, 7, 0]},
        {"name": "sequence_lengths", "datatype": "INT32", "shape": [2, 1], "data": [2, 1]},
    ],
    "outputs": [{"name": "output_embedding"}],
}
_TOKENIZED = {"model": TEXT, "messages": [{"role": "user", "content": "Anna"}], "add_generation_prompt": True}
_BASES: list[tuple[str, Any]] = [
    *[("/v1/embeddings", _EMBEDDING)] * 3,
    *[("/pooling", _POOLING)] * 2,
    *((path, _RERANK) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
    *((path, _SCORE) for path in ("/score", "/v1/score")),
    ("/classify", _EMBEDDING),
    ("/tokenize", _TOKENIZED),
    ("/tokenize", {"model": VECTORS, "prompt": "the garden", "return_token_strs": True}),
    ("/detokenize", {"model": TEXT, "tokens": [5, 6, 7]}),
    *[(f"/v2/models/{VECTORS}/infer", _TEXTS)] * 2,
    *[(f"/v2/models/{VECTOR_TOKENS}/infer", _IDS)] * 2,
    (f"/v2/models/{VECTORS}/generate", {"text_input": "the garden", "parameters": {"dimensions": 4}}),
]


def pooling(rng: random.Random) -> HttpAttack:
    """Over the routes for vectors, scores and tokens."""
    return posted(rng, *rng.choice(_BASES))


def _post(path: str, **body: Any) -> HttpAttack:
    return HttpAttack(request("POST", path, json.dumps({"model": VECTORS, **body}).encode()))


def _any(*values: Any) -> tuple[Any, ...]:
    return values


BY_HAND = [
    *(
        _post("/v1/embeddings", input=given)
        for given in _any([], "", [[]], [""], ["a", 1], [-1], [2**31], [2**70], [[5], []], None, {"a": 1}, ["a"] * 5000)
    ),
    *(_post("/v1/embeddings", input=given) for given in _any("a" * 200_000, [5] * 5000, [[[5]]], "\ud800", ["\0"])),
    *(_post("/v1/embeddings", input="a", dimensions=count) for count in (0, -1, 2**31, 2**70, 1.5, "3", True)),
    *(_post("/v1/embeddings", input="a", encoding_format=name) for name in ("", "bytes", 1, None)),
    *(_post("/v1/embeddings", input="a", prompt_name=name) for name in ("none", "", 1)),
    *(_post("/pooling", input="a", task=name) for name in ("classify", "score", "token_embed", "token_classify", "x")),
    *(_post("/pooling", input="a", truncate_prompt_tokens=count) for count in (0, -2, 2**63, 2**70, 1.5)),
    *(_post("/score", text_1=first, text_2=["a"] * 3) for first in _any([], ["a", "b"], [1], None, "a" * 200_000)),
    _post("/score", text_1=["a"] * 3000, text_2=["a"] * 3000),
    _post("/score", text_1="a", text_2="b", queries="a", documents="b"),
    *(_post("/rerank", query="a", documents=given) for given in _any([], [{}], [{"text": 1}], [1], "a", ["a"] * 5000)),
    *(_post("/rerank", query="a", documents=["b"], top_n=count) for count in (0, -1, 2**70, 1.5)),
    *(_post("/classify", input=given) for given in _any("a", [5, 6])),
    *(_post("/detokenize", tokens=given) for given in _any([-1], [2**31], [2**70], [1.5], [[1]], "a", [5] * 300_000)),
    *(_post("/tokenize", prompt=given) for given in _any(1, [], "\ud800", "a" * 2_000_000)),
    _post("/v1/completions", prompt="a"),
    _post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}]),
]
