"""A model that two engines serve behind one server: real processes on the demo model."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.server.engine_helpers import LONG, SHORT, begin, collect, joined, stopped, until
from tests.server.loop_thread import LoopThread
from tests.waiting import attempts

from hasten.cli.main import build_parser
from hasten.cli.serve import serve_options
from hasten.core.errors import ConfigError, EngineError
from hasten.core.types import FinishReason, SamplingParams
from hasten.engine.llm import LLM
from hasten.server.app import Server, _repository
from hasten.server.engine.client import EngineClient
from hasten.server.engine.replica import Replica
from hasten.server.options import EndpointOptions, ModelOptions, RepositoryOptions, ServeOptions, ServerOptions
from hasten.server.protocol.settings import LogSettings

CONFIG = """
backend: "fastertransformer"
instance_group [ {{ count: 2 }} ]
parameters {{ key: "model_checkpoint_path" value {{ string_value: "{model}" }} }}
parameters {{ key: "max_num_seqs" value {{ string_value: "4" }} }}
"""
ENDS = EndpointOptions(http_address="127.0.0.1", http_port=0, allow_grpc=False, allow_metrics=True, metrics_port=0)
STALL_S = 20.0


class Site(LoopThread):
    """A server with the model `story`, and an event loop in a thread that it lives in."""

    def __init__(self, repository: Path) -> None:
        super().__init__()
        explicit = RepositoryOptions(model_control_mode="explicit", load_model=("story",))
        server = ServerOptions(stall_timeout_secs=STALL_S, exit_timeout_secs=0)
        options = ServeOptions(model_repository=(str(repository),), endpoints=ENDS, repository=explicit, server=server)
        self.server: Server = self.run(self._start(options))
        assert self.server.http is not None
        self.http = httpx.Client(base_url=f"http://{self.server.http.address}")

    async def _start(self, options: ServeOptions) -> Server:
        server = Server(options, LogSettings())
        await server.start()
        return server

    @property
    def engines(self) -> EngineClient:
        return self.server.service.engines()["story", "1"]

    def is_ready(self) -> bool:
        return self.http.get("/v2/health/ready").status_code == 200

    def metrics(self) -> dict[str, float]:
        """Samples by their names and labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def close(self) -> None:
        self.http.close()
        try:
            self.run(self.server.stop(0))
        finally:
            super().close()


@pytest.fixture(scope="module")
def site(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    repository = tmp_path_factory.mktemp("repository")
    (repository / "story" / "1").mkdir(parents=True)
    (repository / "story" / "config.pbtxt").write_text(CONFIG.format(model=demo_model))
    site = Site(repository)
    yield site
    site.close()


def prompt(number: int, tokens: int = 40) -> list[int]:
    return [5 + (7 * number + position * (number + 1)) % 900 for position in range(tokens)]


def taken(site: Site) -> list[int]:
    """Tokens of prompts that each engine has taken."""
    return [replica.stats().prompt_tokens for replica in site.engines.replicas]


def sample(name: str, replica: int) -> str:
    return f'hasten_replica_{name}{{model="story",replica="{replica}",version="1"}}'


PARAMS = [
    SamplingParams(max_tokens=12, temperature=0),
    SamplingParams(max_tokens=12, temperature=0.9, seed=7),
    SamplingParams(max_tokens=12, n=3, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=8, beam_width=3, n=2),
]


def test_answers_are_those_of_one_engine(site: Site, demo_llm: LLM) -> None:
    prompts, params = [prompt(number) for number in range(16)], [PARAMS[number % 4] for number in range(16)]

    async def ask() -> list[Any]:
        pairs = zip(prompts, params, strict=True)
        return await asyncio.gather(*(collect(site.engines, tokens, each) for tokens, each in pairs))

    before = taken(site)
    for progress, output in zip(site.run(ask()), demo_llm.generate(prompts, params), strict=True):
        result = [delta.token_ids for delta in joined(progress).completions]
        assert result == [completion.token_ids for completion in output.outputs]
    assert all(after > earlier for after, earlier in zip(taken(site), before, strict=True)), "one had nothing to do"
    requested = {"model": "story", "prompt": prompts[0], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    texts = {site.http.post("/v1/completions", json=requested).json()["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 1


def test_a_prefix_goes_to_the_engine_that_has_it(site: Site) -> None:
    conversations = [prompt(100 + number, 200) for number in range(6)]

    def turn(tokens: list[int]) -> int:
        """Number of the engine that takes a prompt."""
        before = taken(site)
        site.run(collect(site.engines, tokens, SHORT))
        (number,) = (at for at, (new, old) in enumerate(zip(taken(site), before, strict=True)) if new > old)
        return number

    first = [turn(tokens) for tokens in conversations]
    assert set(first) == {0, 1}
    hits = site.engines.stats().prefix_hit_tokens
    assert [turn([*tokens, *range(5, 45)]) for tokens in conversations[::-1]] == first[::-1]
    assert site.engines.stats().prefix_hit_tokens - hits == 6 * 192


async def fill(site: Site, stack: AsyncExitStack) -> dict[Replica, list[AsyncGenerator[Any, None]]]:
    """Long requests in all places of both engines, by their engines."""
    replicas = site.engines.replicas
    for _ in attempts("long requests that all run at once"):
        streams = await asyncio.gather(*(begin(site.engines, prompt(number + 50, 20), LONG) for number in range(8)))
        numbers = sorted((number, at) for at, replica in enumerate(replicas) for number in replica.requests._tickets)
        if len(numbers) == len(streams):
            break
        for stream in streams:
            await stream.aclose()
    made: dict[Replica, list[AsyncGenerator[Any, None]]] = {replica: [] for replica in replicas}
    for stream, (_, at) in zip(streams, numbers, strict=True):
        stack.push_async_callback(stream.aclose)
        made[replicas[at]].append(stream)
    return made


def test_the_shortest_queue_gets_the_next_and_a_client_that_leaves_frees_its_engine(site: Site) -> None:
    async def ask() -> None:
        async with AsyncExitStack() as stack:
            streams = await fill(site, stack)
            first, second = site.engines.replicas
            assert [len(streams[replica]) for replica in (first, second)] == [4, 4]
            with stopped(site.engines):  # the first one, whose requests do not end meanwhile
                for stream in streams[second]:
                    await stream.aclose()
                await until(lambda: second.stats().running == 0)
                before = taken(site)
                await asyncio.gather(*(collect(site.engines, prompt(number + 70), SHORT) for number in range(4)))
                assert taken(site) == [before[0], before[1] + 160]
        await until(lambda: site.engines.stats().used_blocks == 0)

    site.run(ask())


def test_an_engine_is_killed_under_load(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """What it ran fails, what it had not begun moves, and the server is ready all the time."""
    ready = list[bool]()

    async def see() -> None:
        while True:
            ready.append(site.server.service.is_ready() and site.engines.ready)
            await asyncio.sleep(0.01)

    async def die() -> None:
        seeing = asyncio.create_task(see())
        dying, other = site.engines.replicas
        async with AsyncExitStack() as stack:
            streams = await fill(site, stack)
            pid = dying.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)  # it ends none of its requests before it is killed
            waiting = [asyncio.create_task(collect(site.engines, prompt(number), SHORT)) for number in range(10)]
            await until(lambda: len(dying.requests._tickets) == 5)
            ahead = [each for each in dying.requests._tickets.values() if each.begun is None]
            assert len(ahead) == 1
            os.kill(pid, signal.SIGKILL)
            for stream in streams[dying]:
                with pytest.raises(
                    EngineError, match="story version 1, replica 0 failed while it had the request: its"
                ):
                    async for _ in stream:
                        pass
            failed = [site.engines.counters.of(index).finished[FinishReason.ERROR] for index in (0, 1)]
            assert failed == [len(streams[dying]), 0]
            assert site.server.service.index(ready=True)[0].reason == "1 of 2 replicas not ready: 0"
            assert ahead[0].moved
            assert ahead[0].engine in (None, other.requests)
            for stream in streams[other]:
                await stream.aclose()
            for task in waiting:
                assert joined(await task).finished
        await until(lambda: dying.ready)
        assert dying.pid != pid
        seeing.cancel()

    site.run(die())
    assert set(ready) == {True}
    assert "story version 1, replica 0: process" in caplog.text
    assert (site.engines.restarts, site.metrics()[sample("restarts_total", 0)]) == (1, 1)
    before = taken(site)
    site.run(asyncio.wait_for(both(site), 100))
    assert [after - earlier for after, earlier in zip(taken(site), before, strict=True)] == [80, 80]


async def both(site: Site) -> None:
    """Four requests at once, which both engines share."""
    await asyncio.gather(*(collect(site.engines, prompt(number + 200), SHORT) for number in range(4)))


def test_an_engine_that_stands_still_gives_back_what_it_has_not_begun(site: Site) -> None:
    async def stand() -> None:
        frozen, other = site.engines.replicas
        async with AsyncExitStack() as stack:
            streams = await fill(site, stack)
            assert frozen.pid is not None
            os.kill(frozen.pid, signal.SIGSTOP)
            try:
                waiting = [asyncio.create_task(collect(site.engines, prompt(number), SHORT)) for number in range(2)]
                await until(lambda: len(frozen.requests._tickets) == 5)
                await asyncio.sleep(0.05)  # what its process had sent is read
                frozen.requests.heard -= STALL_S
                for stream in streams[other]:
                    await stream.aclose()
                for task in waiting:  # one was with the engine that stands still
                    assert joined(await task).finished
                assert not frozen.ready
                assert site.engines.ready
                samples = await asyncio.to_thread(site.metrics)
                assert [samples[sample("ready", number)] for number in (0, 1)] == [0, 1]
            finally:
                os.kill(frozen.pid, signal.SIGCONT)
            await until(lambda: frozen.ready)
        await until(lambda: site.engines.stats().used_blocks == 0)
        assert (site.engines.stats().running, site.engines.stats().waiting) == (0, 0)

    site.run(stand())


def test_metrics_of_the_model_are_sums(site: Site) -> None:
    samples = site.metrics()
    for name in ("requests_running", "requests_waiting", "prefix_cache_hit_tokens_total"):
        parts = [samples[sample(name, number)] for number in (0, 1)]
        assert samples[f'hasten_{name}{{model="story",version="1"}}'] == sum(parts)
    assert [samples[sample("ready", number)] for number in (0, 1)] == [1, 1]
    (engine,) = site.http.get("/state").json()["engines"]
    assert (engine["replicas"], engine["replicas_ready"]) == (2, 2)


def test_unloading_and_loading_again_leaves_no_process(site: Site) -> None:
    old = [replica.pid for replica in site.engines.replicas if replica.pid is not None]
    assert len(old) == 2
    assert all(map(psutil.pid_exists, old))
    assert site.http.post("/v2/repository/models/story/unload").status_code == 200
    site.run(until(lambda: not any(map(psutil.pid_exists, old))))
    assert site.http.post("/v2/repository/models/story/load").status_code == 200
    assert len(site.engines.replicas) == 2
    site.run(asyncio.wait_for(both(site), 100))
    assert taken(site) == [80, 80]
    assert site.is_ready()


def test_the_command_says_how_many_engines(demo_model: Path) -> None:
    options = serve_options(build_parser().parse_args(["serve", str(demo_model), "-dp", "3"]))
    assert options.model == ModelOptions(data_parallel_size=3)
    described = _repository(options).describe("fastertransformer")
    assert described is not None
    assert described.config.instance_group[0].count == 3
    with pytest.raises(ConfigError, match="--data-parallel-size must be at least 1, got 0"):
        serve_options(build_parser().parse_args(["serve", str(demo_model), "--data-parallel-size", "0"]))
