"""One event loop for all tests of the server, and one engine on the demo model behind it."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
from tests.forked import forked_engines
from tests.waiting import LIMIT_S, eventually

from hasten.core.config import EngineConfig
from hasten.engine.llm import LLM
from hasten.server.engine.client import EngineClient

if TYPE_CHECKING:
    import openai
    from tests.server.openai_site import Site
    from tests.server.transport_fixtures import Transports

# By default httpx gives an answer 5 s, which it may need longer for on a busy machine.
_timeout = inspect.signature(httpx.get).parameters["timeout"].default
_timeout.connect = _timeout.read = _timeout.write = _timeout.pool = LIMIT_S

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model: a BLOOM of 3.4 million parameters with its tokenizer."""
    return Path(__file__).parents[2] / "examples/demo-model"


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs a coroutine on the event loop that all tests share."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module", autouse=True)
def engines_are_forked() -> Iterator[None]:
    """Engines of tests are copies of one process: each would import torch anew for longer than most of them compute."""
    with forked_engines():
        yield


@pytest.fixture(scope="session")
def demo_engine(run: Run[EngineClient], demo_model: Path) -> Iterator[EngineClient]:
    """An engine with the defaults, in its process."""
    with forked_engines():
        client = run(EngineClient.start(EngineConfig.create(str(demo_model)), name="demo"))
    yield client
    run(client.close())  # type: ignore[arg-type]  # the loop runs any coroutine


@pytest.fixture(scope="session")
def demo_llm(demo_model: Path) -> Iterator[LLM]:
    """The same engine in this process, to compare with."""
    with LLM(demo_model) as llm:
        yield llm


@pytest.fixture(scope="module")
def transports() -> "Iterator[Transports]":
    """A service that adds numbers, over gRPC and HTTP."""
    from tests.server.transport_fixtures import Transports, serving

    with serving(Transports()) as transports:
        yield transports


@pytest.fixture(scope="module")
def http(transports: "Transports") -> Iterator[httpx.Client]:
    """A client of `transports`."""
    with httpx.Client(base_url=f"http://{transports.http}", timeout=LIMIT_S) as client:
        yield client


@pytest.fixture(scope="session")
def tool_site(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Site]":
    """A server whose model `story` has a chat template with tools."""
    from tests.server.tool_model import serve_tools

    with forked_engines():
        site = serve_tools(tmp_path_factory.mktemp("tools"))
    yield site
    site.close()


@pytest.fixture(scope="session")
def tool_client(tool_site: "Site") -> "Iterator[openai.OpenAI]":
    """The stock openai client of `tool_site`."""
    import openai

    with openai.OpenAI(base_url=f"{tool_site.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def tool_engine_left_idle(tool_site: "Site") -> Iterator[None]:
    """Checks after the test that the engine of `tool_site` computes nothing and holds no blocks."""
    yield
    eventually(lambda: tool_site.engine("tokens").ready and tool_site.idle("tokens"))
