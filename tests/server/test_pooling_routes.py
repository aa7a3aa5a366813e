"""Vectors and scores over HTTP, from encoders beside a model that generates: stock clients, and what is refused."""

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI
from tests.encoders import TEXTS, save_encoder, save_pooling, their_output, theirs
from tests.server.engine_helpers import stopped
from tests.server.openai_site import DEMO, Site, models
from tests.server.test_page import ARGUMENTS, CHROMIUM
from tests.waiting import LIMIT_S, eventually
from torch import Tensor

from hasten.engine.text import Tokenizer
from hasten.server.engine.queue import QueueLimits

BOUND = 1e-5
QUERY = "Where is the garden?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    result = {name: tmp_path_factory.mktemp(name) for name in ("embedder", "ranker", "tagger")}
    save_encoder(result["embedder"], "Bert", "ForMaskedLM", num_hidden_layers=2, matryoshka_dimensions=[16, 8])
    pooling = ("Pooling", "1_Pooling", {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True})
    prompts = {"prompts": {"query": "the question: "}}
    save_pooling(result["embedder"], [pooling, ("Normalize", "2_Normalize", {})], config_sentence_transformers=prompts)
    save_encoder(result["ranker"], "Bert", "ForSequenceClassification", num_hidden_layers=2, num_labels=1)
    save_encoder(result["tagger"], "DistilBert", "ForTokenClassification", n_layers=2, num_labels=3)
    return result


@pytest.fixture(scope="module")
def site(folders: dict[str, Path]) -> Iterator[Site]:
    """An embedder, a cross-encoder, a model that labels tokens, and one that generates."""
    few: dict[str, dict[str, Any]] = {"ranker": {"limits": QueueLimits(max_queue_size=9), "max_num_seqs": 2}}
    configs = [
        config
        for name, folder in folders.items()
        for config in models(folder, f"{name}-ids", name, **few.get(name, {}))
    ]
    site = Site([*configs, *models(DEMO, "demo-ids", "demo")])
    yield site
    site.close()


@pytest.fixture(scope="module")
def openai(site: Site) -> OpenAI:
    return OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def vectors(folders: dict[str, Path]) -> Any:
    """Transformers' own: the normed mean of hidden states of a text, or of token ids."""
    model, tokenizer = theirs(folders["embedder"]), Tokenizer.from_folder(folders["embedder"])

    def vector(text: str | Sequence[int]) -> Tensor:
        ids = tokenizer.encode(text) if isinstance(text, str) else text
        mean = their_output(model, ids).mean(0)
        return mean / mean.norm()

    return vector


@pytest.fixture(scope="module")
def relevance(folders: dict[str, Path]) -> Any:
    """Transformers' own score of a document."""
    model, tokenizer = (
        theirs(folders["ranker"], "ModelForSequenceClassification"),
        Tokenizer.from_folder(folders["ranker"]),
    )

    def score(query: str, document: str) -> float:
        first, second = tokenizer.encode_pair(query, document)
        types = [0] * len(first) + [1] * len(second)
        return float(their_output(model, [*first, *second], types).sigmoid())

    return score


def post(site: Site, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(site.url + path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refused(site: Site, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(site.url + path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return error


def close(found: Any, expected: Tensor) -> bool:
    return bool((torch.tensor(np.array(found, np.float32)) - expected).abs().max() < BOUND)


def test_the_client_of_openai(openai: OpenAI, vectors: Any) -> None:
    answer = openai.embeddings.create(model="embedder", input=TEXTS)
    for entry, text in zip(answer.data, TEXTS, strict=True):
        assert close(entry.embedding, vectors(text))
    assert [entry.index for entry in answer.data] == list(range(len(TEXTS)))
    plain = openai.embeddings.create(model="embedder", input=TEXTS[0], encoding_format="float")
    assert close(plain.data[0].embedding, vectors(TEXTS[0]))
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 2
    assert plain.model == "embedder"


def test_token_ids_as_langchain_sends_them(openai: OpenAI, vectors: Any) -> None:
    answer = openai.embeddings.create(model="embedder", input=[[2, 9, 4, 3], [2, 3]])
    assert close(answer.data[0].embedding, vectors([2, 9, 4, 3]))
    assert close(answer.data[1].embedding, vectors([2, 3]))
    assert answer.usage.prompt_tokens == 6
    assert close(openai.embeddings.create(model="embedder", input=[2, 9, 3]).data[0].embedding, vectors([2, 9, 3]))


def test_numbers_as_base64(site: Site, vectors: Any) -> None:
    answer = post(site, "/v1/embeddings", model="embedder", input=["", "the"], encoding_format="base64")
    found = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in answer["data"]]
    assert close(found, torch.stack([vectors(""), vectors("the")]))


def test_shorter_vectors(openai: OpenAI, site: Site, vectors: Any) -> None:
    whole = vectors("the garden")[:16]
    (entry,) = openai.embeddings.create(model="embedder", input="the garden", dimensions=16).data
    assert close(entry.embedding, whole / whole.norm())
    error = refused(site, "/v1/embeddings", model="embedder", input="the", dimensions=12)
    assert error["message"] == "dimensions is 12; the model's vectors may be cut to 16, 8"
    assert error["param"] == "dimensions"


def test_a_prompt_of_the_model_stands_before_texts(site: Site, vectors: Any) -> None:
    (entry,) = post(site, "/v1/embeddings", model="embedder", input="the garden", prompt_name="query")["data"]
    assert close(entry["embedding"], vectors("the question: the garden"))
    message = refused(site, "/v1/embeddings", model="embedder", input="the", prompt_name="x")["message"]
    assert message == "prompt_name 'x' is no prompt of the model; there are: query"


def test_many_texts_of_many_clients(site: Site, openai: OpenAI, vectors: Any) -> None:
    texts = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(1000)]
    before = site.engine("embedder-ids").stats().steps

    def ask(_: int) -> list[list[float]]:
        return [entry.embedding for entry in openai.embeddings.create(model="embedder", input=texts).data]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert np.abs(np.array(first) - np.array(second)).max() < BOUND
    for number in (0, 499, 999):
        assert close(first[number], vectors(texts[number]))
    assert site.engine("embedder-ids").stats().steps - before < 400
    assert site.idle("embedder-ids")


def test_ranking_by_a_cross_encoder(site: Site, relevance: Any) -> None:
    documents = TEXTS[:5]
    expected = {number: relevance(QUERY, text) for number, text in enumerate(documents)}
    best = sorted(expected, key=lambda number: -expected[number])
    answer = post(site, "/rerank", model="ranker", query=QUERY, documents=documents)
    assert [entry["index"] for entry in answer["results"]] == best
    for entry in answer["results"]:
        assert entry["relevance_score"] == pytest.approx(expected[entry["index"]], abs=BOUND)
        assert entry["document"] == {"text": documents[entry["index"]]}
    assert answer["usage"]["total_tokens"] > 0
    objects = [{"text": text, "id": "any"} for text in documents]
    short = post(site, "/v1/rerank", model="ranker", query=QUERY, documents=objects, top_n=2, return_documents=False)
    assert [entry["index"] for entry in short["results"]] == best[:2]
    assert set(short["results"][0]) == {"index", "relevance_score"}
    cohere = post(site, "/v2/rerank", model="ranker", query=QUERY, documents=documents, top_n=1)
    assert set(cohere) >= {"id", "results", "meta"}
    assert set(cohere["results"][0]) == {"index", "relevance_score"}


def test_scores(site: Site, relevance: Any, vectors: Any) -> None:
    for path in ("/score", "/v1/score"):
        answer = post(site, path, model="ranker", text_1=QUERY, text_2=TEXTS[:3])
        found = [entry["score"] for entry in answer["data"]]
        assert found == pytest.approx([relevance(QUERY, text) for text in TEXTS[:3]], abs=BOUND)
    answer = post(site, "/score", model="embedder", queries=TEXTS[:2], documents=TEXTS[2:4])
    cosines = [float(vectors(TEXTS[at]) @ vectors(TEXTS[at + 2])) for at in range(2)]
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(cosines, abs=BOUND)
    ranked = post(site, "/rerank", model="embedder", query=TEXTS[0], documents=[TEXTS[3], TEXTS[0]])
    assert ranked["results"][0]["index"] == 1
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1, abs=BOUND)


def test_classes(site: Site, folders: dict[str, Path]) -> None:
    answer = post(site, "/classify", model="ranker", input=TEXTS[:2])
    model, tokenizer = (
        theirs(folders["ranker"], "ModelForSequenceClassification"),
        Tokenizer.from_folder(folders["ranker"]),
    )
    for entry, text in zip(answer["data"], TEXTS, strict=False):
        logits = their_output(model, tokenizer.encode(text))
        assert entry["probs"] == pytest.approx(logits.sigmoid().tolist(), abs=BOUND)
        assert (entry["label"], entry["num_classes"]) == ("LABEL_0", 1)
    plain = post(site, "/classify", model="ranker", input=TEXTS[0], activation=False)
    logits = their_output(model, tokenizer.encode(TEXTS[0]))
    assert plain["data"][0]["probs"] == pytest.approx(logits.tolist(), abs=1e-4)


def test_what_is_made_of_each_token(site: Site, folders: dict[str, Path]) -> None:
    (entry,) = post(site, "/pooling", model="tagger", input=TEXTS[0])["data"]
    model, tokenizer = (
        theirs(folders["tagger"], "ModelForTokenClassification"),
        Tokenizer.from_folder(folders["tagger"]),
    )
    assert close(entry["data"], their_output(model, tokenizer.encode(TEXTS[0])).softmax(-1))
    (entry,) = post(site, "/pooling", model="embedder", task="token_embed", input=TEXTS[1])["data"]
    hidden = their_output(theirs(folders["embedder"]), Tokenizer.from_folder(folders["embedder"]).encode(TEXTS[1]))
    assert close(entry["data"], hidden)
    (entry,) = post(site, "/pooling", model="embedder", input=TEXTS[1], normalize=False)["data"]
    assert close(entry["data"], hidden.mean(0))


def test_words_for_masks(site: Site, folders: dict[str, Path]) -> None:
    tokenizer, model = Tokenizer.from_folder(folders["embedder"]), theirs(folders["embedder"], "ModelForMaskedLM")
    texts = ["the [MASK] of a garden", "[MASK] and [MASK]"]
    answer = post(site, "/pooling", model="embedder", input=texts, task="fill_mask", top_k=3)
    for entry, text in zip(answer["data"], texts, strict=True):
        ids = tokenizer.encode(text)
        rows = [index for index, token in enumerate(ids) if token == tokenizer.mask_token_id]
        best = their_output(model, ids)[rows].softmax(-1).topk(3)
        assert [[word["token"] for word in words] for words in entry["data"]] == best.indices.tolist()
        assert close([[word["score"] for word in words] for words in entry["data"]], best.values)
    first = answer["data"][0]["data"][0][0]
    assert first["sequence"] == f"the {first['token_str']} of a garden"
    requested = {"model": "embedder", "input": texts[0], "task": "fill_mask", "targets": ["letter", 5]}
    (entry,) = post(site, "/pooling", **requested)["data"]
    assert {word["token"] for word in entry["data"][0]} == {tokenizer.token_id("letter"), 5}


def test_long_texts(site: Site, vectors: Any, folders: dict[str, Path]) -> None:
    long = "the garden " * 400
    error = refused(site, "/v1/embeddings", model="embedder", input=["the", long])
    assert error["message"].startswith("input[1] has 802 tokens; the model takes at most 320: shorten it")
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    ids = Tokenizer.from_folder(folders["embedder"]).encode(long)
    (entry,) = post(site, "/v1/embeddings", model="embedder", input=long, truncate_prompt_tokens=-1)["data"]
    assert close(entry["embedding"], vectors([*ids[:319], 3]))
    (entry,) = post(site, "/v1/embeddings", model="embedder", input=[ids], truncate_prompt_tokens=5)["data"]
    assert close(entry["embedding"], vectors(ids[:5]))
    assert refused(site, "/rerank", model="ranker", query="the", documents=[long])["code"] == "context_length_exceeded"
    short = post(site, "/rerank", model="ranker", query="the", documents=[long], truncate_prompt_tokens=20)
    assert short["usage"]["prompt_tokens"] == 20


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/embeddings", {"model": "embedder", "input": []}, "input is empty"),
        ("/v1/embeddings", {"model": "embedder", "input": ["a", 3]}, "input mixes texts, token ids"),
        ("/v1/embeddings", {"model": "embedder", "input": [[]]}, "input[0] has no tokens"),
        ("/v1/embeddings", {"model": "embedder", "input": [[2, 9999]]}, "input[0] has token id 9999; the vocab"),
        ("/v1/embeddings", {"model": "embedder", "input": ["a"] * 2049}, "input has 2049 texts, the limit is 2048"),
        ("/v1/embeddings", {"model": "embedder", "input": "a", "encoding_format": "hex"}, "encoding_format must be"),
        ("/v1/embeddings", {"model": "embedder", "input": "a", "inptu": 1}, "the request is not valid"),
        ("/v1/embeddings", {"input": "a"}, "give the model; there are: "),
        ("/v1/embeddings", {"model": "embedder", "input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"model": "demo", "input": "a"}, "a model of type bloom generates text; it cannot embed"),
        ("/v1/embeddings", {"model": "ranker", "input": "a"}, "BertForSequenceClassification is not a model to embed"),
        ("/rerank", {"model": "tagger", "query": "a", "documents": ["b"]}, "score needs a model with one label"),
        ("/rerank", {"model": "ranker", "query": "a", "documents": []}, "documents is empty"),
        ("/rerank", {"model": "ranker", "query": "a", "documents": [{"t": "b"}]}, "documents[0] has no text"),
        ("/rerank", {"model": "ranker", "query": "a", "documents": ["b"], "top_n": 0}, "top_n must be at least 1"),
        ("/score", {"model": "ranker", "text_1": ["a", "b"], "text_2": ["c"]}, "text_1 has 2 texts and text_2 1"),
        ("/score", {"model": "ranker", "text_1": "a"}, "text_2 is missing"),
        ("/classify", {"model": "embedder", "input": "a"}, "BertForMaskedLM is not a model to classify"),
        ("/pooling", {"model": "embedder", "input": "a", "task": "sing"}, "the request is not valid"),
        ("/pooling", {"model": "embedder", "input": ["the garden " * 150] * 2000, "task": "token_embed"}, "the answer"),
        (
            "/pooling",
            {"model": "embedder", "input": ["[MASK]", "a"], "task": "fill_mask"},
            "input[1]: the text has no m",
        ),
        ("/pooling", {"model": "embedder", "input": "[MASK]", "top_k": 3}, "top_k: for masks alone; give the task"),
        (
            "/pooling",
            {"model": "embedder", "input": "[MASK]", "task": "fill_mask", "top_k": 0},
            "top_k must be at leas",
        ),
        (
            "/pooling",
            {"model": "tagger", "input": "[MASK]", "task": "fill_mask"},
            "DistilBertForTokenClassification is n",
        ),
        (
            "/pooling",
            {"model": "embedder", "input": "[MASK]", "task": "fill_mask", "targets": ["the garden"]},
            "targets[0] 'the garden' is 2 tokens; a mask gets one",
        ),
        ("/v1/completions", {"model": "embedder", "prompt": "a"}, "BertForMaskedLM generates no text; it does embed"),
        ("/v1/chat/completions", {"model": "ranker", "messages": []}, "BertForSequenceClassification generates no"),
    ],
)
def test_what_is_refused(site: Site, path: str, body: dict[str, Any], message: str) -> None:
    error = refused(site, path, **body)
    assert error["message"].startswith(message)


def test_a_model_that_generates_goes_on_beside_it(site: Site, openai: OpenAI) -> None:
    def generate(_: int) -> str:
        return openai.completions.create(model="demo", prompt="The house", max_tokens=8, temperature=0).choices[0].text

    def embed(_: int) -> list[float]:
        return openai.embeddings.create(model="embedder", input="the house").data[0].embedding

    with ThreadPoolExecutor(4) as pool:
        texts, found = pool.map(generate, range(6)), pool.map(embed, range(6))
        assert len(set(texts)) == 1
        assert np.ptp(np.array(list(found)), axis=0).max() < BOUND
    with pytest.raises(BadRequestError, match="generates text; it cannot embed"):
        openai.embeddings.create(model="demo", input="the house")


def test_what_the_models_are(site: Site, openai: OpenAI) -> None:
    found = {model.id: model.to_dict() for model in openai.models.list()}
    assert found["embedder"]["tasks"] == ["embed", "token_embed", "fill_mask"]
    assert found["embedder"]["width"] == 48
    assert found["ranker"]["tasks"] == ["classify", "score"]
    assert found["ranker"]["labels"] == ["LABEL_0"]
    assert found["demo"]["tasks"] == ["generate"]
    engines = {engine["id"]: engine for engine in httpx.get(f"{site.url}/state").json()["engines"]}
    assert engines["tagger"]["tasks"] == ["token_classify"]
    assert engines["demo"]["tasks"] == ["generate"]


def test_a_client_that_leaves_takes_its_texts_with_it(site: Site) -> None:
    engine, texts = site.engine("embedder-ids"), ["the garden " * 150] * 1000
    before = engine.stats().prompt_tokens
    with stopped(engine), pytest.raises(httpx.TimeoutException):
        httpx.post(f"{site.url}/v1/embeddings", json={"model": "embedder", "input": texts}, timeout=1)
    eventually(lambda: site.idle("embedder-ids"))
    assert engine.stats().prompt_tokens - before < 302 * len(texts) / 2


def test_more_than_may_wait_is_refused(site: Site) -> None:
    response = httpx.post(f"{site.url}/rerank", json={"model": "ranker", "query": QUERY, "documents": ["a"] * 100})
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    eventually(lambda: site.idle("ranker-ids"))


def test_they_are_counted(site: Site) -> None:
    counters = site.service.counters["embedder-ids", "1"].language
    assert counters is not None
    before = counters.total
    post(site, "/v1/embeddings", model="embedder", input=["the", "a garden"])
    now = counters.total
    assert now.texts == before.texts + 2
    assert now.prompt_tokens > before.prompt_tokens
    assert now.latency.count == before.latency.count + 2


@pytest.mark.any_python
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_shows_vectors_and_scores(site: Site) -> None:
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS)) as browser,
    ):
        page = browser.new_page()
        page.set_default_timeout(1000 * LIMIT_S)
        page.goto(site.url)
        for model, button, shown in (
            ("embedder", "Embed", "48 numbers: "),
            ("ranker", "Classify", "LABEL_0 0."),
            ("tagger", "Classify", " tokens: LABEL_0 0."),
        ):
            page.get_by_label("Model", exact=True).select_option(model)
            assert page.get_by_label("Temperature").is_disabled()
            page.get_by_role("button", name=button).click()
            page.locator(".text").filter(has_text=shown).wait_for()
        page.get_by_label("Model", exact=True).select_option("demo")
        assert page.get_by_label("Temperature").is_enabled()
        assert page.get_by_role("button", name="Generate").is_enabled()
