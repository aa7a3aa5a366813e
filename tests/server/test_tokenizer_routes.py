"""vLLM's routes for a model's tokenizer, against transformers: no engine is needed for them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from tests.server.openai_site import DEMO, with_template

from hasten.core.config import EngineConfig
from hasten.engine.text import Tokenizer
from hasten.server import tokenizing
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import QueueLimits
from hasten.server.engine.wire import EngineInfo
from hasten.server.openai.prompts import ChatPrompts
from hasten.server.openai.routes import openai_routes
from hasten.server.protocol.http import http_app
from hasten.server.security import Admission, ApiKeys
from hasten.server.statistics import Counters

TEXT = "Anna opened the door.\nÄ ☃"
CHAT = [{"role": "user", "content": "Anna opened the door."}]
RENDERED = "<s>user: Anna opened the door.\nassistant:"


def engine(folder: Path) -> EngineClient:
    """One whose process is not started: its tokenizer is all that is asked."""
    result = EngineClient(EngineConfig.create(str(folder)), QueueLimits(), "x", 60.0)
    result.tokenizer = Tokenizer.from_folder(folder)
    sizes: Any = {"vocab_size": 1024, "max_model_len": 64, "num_blocks": 1, "block_size": 16, "max_num_seqs": 8}
    tokens: Any = {"eos_token_ids": (2,), "bos_token_id": 1, "pad_token_id": 3, "tokenizer_folder": str(folder)}
    result.info = EngineInfo(**sizes, **tokens, ranks=1, dtype="fp32", device="cpu", model_type="bloom")
    return result


class Models:
    """A service that has these models alone."""

    def __init__(self, engines: dict[str, EngineClient]) -> None:
        self.counters = Counters()
        self._engines = engines

    changes = 0

    def check_open(self) -> None:
        pass

    def engines(self) -> dict[tuple[str, str], EngineClient]:
        return {(name, "1"): result for name, result in self._engines.items()}

    def tally(self, model: str, version: str, items: int, begun: int) -> Any:
        raise AssertionError("nothing is computed")

    def text_models(self) -> dict[str, str]:
        return {}


class Site:
    """Their routes."""

    def __init__(self, engines: dict[str, EngineClient], keys: ApiKeys | None = None) -> None:
        self._app = http_app(openai_routes(cast(Any, Models(engines)), ChatPrompts()), Admission(keys=keys), 1 << 22)

    def post(self, path: str, **body: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.post(path, json=body)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> EngineClient:
    return engine(with_template(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def site(story: EngineClient) -> Site:
    return Site({"story": story})


@pytest.fixture(scope="module")
def oracle() -> Iterator[Any]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def test_a_prompt_is_tokenized_and_back(site: Site, oracle: Any) -> None:
    answer = site.post("/tokenize", model="story", prompt=TEXT).json()
    ids = oracle(TEXT).input_ids
    assert answer == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}
    assert site.post("/detokenize", model="story", tokens=ids).json() == {"prompt": TEXT}
    assert site.post("/detokenize", tokens=[1, *ids, 2]).json() == {"prompt": oracle.decode([1, *ids, 2])}
    assert site.post("/detokenize", tokens=[]).json() == {"prompt": ""}
    assert site.post("/tokenize", prompt="").json()["count"] == 0


def test_tokens_have_the_vocabularys_own_texts(site: Site, oracle: Any) -> None:
    answer = site.post("/tokenize", prompt=TEXT, return_token_strs=True, add_special_tokens=False).json()
    assert answer["token_strs"] == oracle.convert_ids_to_tokens(answer["tokens"])


def test_a_chat_is_tokenized_as_it_is_answered(site: Site, oracle: Any) -> None:
    plain = site.post("/tokenize", model="story", messages=CHAT).json()
    assert plain["tokens"] == oracle(RENDERED, add_special_tokens=False).input_ids
    closed = site.post("/tokenize", messages=CHAT, add_generation_prompt=False).json()
    assert closed["tokens"] == oracle(RENDERED.removesuffix("assistant:"), add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        ("tokenize", {}, "give either a prompt or messages", "prompt"),
        ("tokenize", {"prompt": "a", "messages": CHAT}, "give either a prompt or messages", "prompt"),
        ("tokenize", {"prompt": "a", "x": 1}, "unknown field `x`", "x"),
        (
            "tokenize",
            {"prompt": "Anna " * 64},
            "the prompt has 130 tokens; the model's",
            "prompt",
        ),
        ("tokenize", {"prompt": "a" * 10**6}, "the prompt has at least ", "prompt"),
        ("tokenize", {"messages": CHAT * 5000}, "messages is limited to 4096, got 5000", "messages"),
        ("tokenize", {"messages": [{"role": "user", "content": "a" * 10**6}]}, "have 1000000 characters", "messages"),
        ("detokenize", {"tokens": [5, 1024]}, "token id 1024; the vocabulary ends at 1023", "tokens"),
        ("detokenize", {"tokens": [-1]}, "token id -1; the vocabulary ends at 1023", "tokens"),
        ("detokenize", {"tokens": [5] * 300_000}, "there are 300000 tokens, the limit is 262144", "tokens"),
        ("detokenize", {}, "missing required field `tokens`", "tokens"),
    ],
)
def test_what_is_wrong_is_refused(site: Site, path: str, body: dict[str, Any], message: str, param: str) -> None:
    answer = site.post(f"/{path}", **body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("tokenize", {"prompt": TEXT, "return_token_strs": True}),
        ("tokenize", {"messages": CHAT, "chat_template_kwargs": {"x": 1}}),
        ("detokenize", {"tokens": [5] * (tokenizing.FEW_DECODED + 1)}),
    ],
)
def test_where_too_many_texts_wait_it_is_a_counted_refusal(
    site: Site, story: EngineClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(tokenizing, "_MAX_WAITING", 0)
    monkeypatch.setattr(story, "estimated_wait", lambda priority: 6.5)
    before = story.refused["queue_full"]
    answer = site.post(f"/{path}", **body)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["code"] == "queue_full"
    assert story.refused["queue_full"] == before + 1


def test_a_model_is_named_where_there_are_several(story: EngineClient) -> None:
    several = Site({"story": story, "demo": engine(DEMO)})
    answer = several.post("/tokenize", prompt="a")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "give the model; there are: demo, story"
    assert several.post("/tokenize", model="demo", prompt="a").status_code == 200
    assert several.post("/tokenize", model="demo", messages=CHAT).status_code == 400  # it has no chat template
    answer = several.post("/detokenize", model="saga", tokens=[])
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert Site({}).post("/tokenize", prompt="a").status_code == 404


def test_a_model_without_a_tokenizer_says_so() -> None:
    bare = engine(DEMO)
    bare.tokenizer = None
    for path, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [5]})):
        answer = Site({"bare": bare}).post(f"/{path}", **body)
        assert answer.status_code == 400
        assert "the model has no tokenizer" in answer.json()["error"]["message"]


def test_a_key_is_needed_where_others_need_one(story: EngineClient) -> None:
    answer = Site({"story": story}, ApiKeys(["secret"])).post("/tokenize", prompt="a")
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
