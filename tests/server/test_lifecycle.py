"""Loading, replacing and unloading, with engines that only count: `test_service` does the same with real ones."""

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.engine_helpers import until
from tests.server.service_fixtures import CountingEngine, Running, tensor, token_request, values
from tests.waiting import LIMIT_S
from tritonclient.grpc import service_pb2

from hasten.core.config import EngineConfig
from hasten.core.errors import CapacityError, CheckpointError
from hasten.server.engine.queue import QueueLimits
from hasten.server.models.config import parse_config
from hasten.server.repository import FolderRepository, MemoryRepository, Repository
from hasten.server.service import ControlMode, Service
from hasten.server.statistics import FailureReason
from hasten.server.types import ErrorKind, InferRequest, ServiceError
from hasten.server.version import LoadFailure


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }} '


def with_token_model(name: str, kind: str = "text") -> str:
    return parameter("kind", kind) + parameter("token_model", name)


def mapped(kind: str, *names: str) -> str:
    return " ".join(f'{kind} {{ key: "{name}" value: "{name}" }}' for name in names)


TEXT = with_token_model("m")
ModelIndex = service_pb2.RepositoryIndexResponse.ModelIndex
ENSEMBLE = f"""
platform: "ensemble" max_batch_size: 8
input {{ name: "input_ids" data_type: TYPE_UINT32 dims: -1 }}
input {{ name: "input_lengths" data_type: TYPE_UINT32 dims: 1 }}
input {{ name: "request_output_len" data_type: TYPE_UINT32 dims: -1 }}
output {{ name: "output_ids" data_type: TYPE_UINT32 dims: [ -1, -1 ] }}
ensemble_scheduling {{ step {{
  model_name: "m" model_version: -1
  {mapped("input_map", "input_ids", "input_lengths", "request_output_len")} {mapped("output_map", "output_ids")}
}} }}
"""


def chained(kind: str, **names: str) -> str:
    return " ".join(f'{kind} {{ key: "{name}" value: "{value}" }}' for name, value in names.items())


CHAIN = f"""
platform: "ensemble" max_batch_size: 8
input {{ name: "input_ids" data_type: TYPE_UINT32 dims: -1 }}
input {{ name: "input_lengths" data_type: TYPE_UINT32 dims: 1 }}
input {{ name: "request_output_len" data_type: TYPE_UINT32 dims: -1 }}
output {{ name: "output_ids" data_type: TYPE_UINT32 dims: [ -1, -1 ] }}
ensemble_scheduling {{
  step {{ model_name: "n" model_version: -1
    {mapped("input_map", "input_ids", "input_lengths", "request_output_len")}
    {chained("output_map", sequence_length="_length")} }}
  step {{ model_name: "m" model_version: -1
    {mapped("input_map", "input_ids", "input_lengths")} {chained("input_map", request_output_len="_length")}
    {mapped("output_map", "output_ids")} }}
}}
"""
"""First `n` completes the prompt, then `m` adds as many tokens as that made."""


class Engines:
    """Starts counting engines, or fails to."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        """Folders of all engines, those that cannot be started included."""
        self.started: list[CountingEngine] = []
        self.limits: list[QueueLimits] = []
        self.pause = 0.0
        self.broken: set[str] = set()
        """Ends of checkpoint folders that cannot be loaded."""
        self.room = 1000
        """Engines that fit the memory."""
        self.gate = threading.Event()
        self.gate.set()

    async def start(self, config: EngineConfig, limits: QueueLimits, *, name: str, engines: int) -> Any:
        while not self.gate.is_set():
            await asyncio.sleep(0.005)
        self.tried.append(config.model)
        if any(config.model.endswith(end) for end in self.broken):
            raise CheckpointError(f"{config.model} has no weights")
        if len(self.alive) >= self.room:
            raise CapacityError("the key/value cache has room for 0 tokens")
        engine = CountingEngine(config, name)
        engine.pause = self.pause
        self.started.append(engine)
        self.limits.append(limits)
        return engine

    @property
    def alive(self) -> list[CountingEngine]:
        return [engine for engine in self.started if not engine.closed]


class Bench(Running):
    """A service over a folder that tests change."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.engines = Engines()

    def start(self, mode: ControlMode = ControlMode.EXPLICIT, *models: str, **options: Any) -> None:
        self.serve(FolderRepository([self.root]), mode, *models, **options)

    def serve(self, repository: Repository, mode: ControlMode, *models: str, **options: Any) -> None:
        async def begin() -> Service:
            service = Service(repository, mode=mode, start_engine=self.engines.start)
            await service.start(models, **options)
            return service

        self._service = self.run(begin())

    def write(self, name: str, config: str = "", versions: tuple[int, ...] = (1,)) -> None:
        for version in versions:
            (self.root / name / str(version)).mkdir(parents=True, exist_ok=True)
        (self.root / name / "config.pbtxt").write_text(config)

    def load(self, name: str, *more: Any) -> None:
        self.run(self.service.load(name, *more))

    def unload(self, name: str, **options: bool) -> None:
        self.run(self.service.unload(name, **options))

    def fails(self, work: Awaitable[Any]) -> tuple[ErrorKind, str]:
        with pytest.raises(ServiceError) as caught:
            self.run(_wait(work))
        return caught.value.kind, str(caught.value)

    def states(self) -> list[tuple[str, str, str, str]]:
        return [(each.name, each.version, str(each.state), each.reason) for each in self.service.index()]

    def until(self, true: Callable[[], bool]) -> None:
        self.run(until(true))

    def answer(self, model: str = "m", version: str = "", prompt: int = 7) -> list[int]:
        """The tokens of a request."""
        request = token_request([[prompt]], 3, model)
        request.version = version
        row: list[int] = self.infer(request, ["output_ids"])["output_ids"][0][0]
        return row


async def _wait(work: Awaitable[Any]) -> Any:
    return await work


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    result = Bench(tmp_path)
    yield result
    result.close()
    assert not result.engines.alive


def test_all_models_are_loaded_at_the_start(bench: Bench) -> None:
    bench.write("m", "version_policy { all { } }", (1, 3))
    bench.write("a", TEXT)
    bench.write("z", ENSEMBLE)
    bench.start(ControlMode.NONE)
    assert bench.states() == [
        ("a", "1", "READY", ""),
        ("m", "1", "READY", ""),
        ("m", "3", "READY", ""),
        ("z", "1", "READY", ""),
    ]
    assert [engine.name for engine in bench.engines.started] == ["m version 1", "m version 3"]
    assert [engine.config.model for engine in bench.engines.started] == [f"{bench.root}/m/1", f"{bench.root}/m/3"]
    assert bench.answer() == bench.answer("z") == [7, 8, 9, 10]
    assert bench.service.is_ready()
    assert list(bench.service.engines()) == [("m", "1"), ("m", "3")]
    for work in (bench.service.load("m"), bench.service.unload("m"), bench.service.load("nope")):
        assert bench.fails(work) == (
            ErrorKind.UNAVAILABLE,
            "explicit model load / unload is not allowed if polling is enabled",
        )


def test_the_newest_version_answers_unless_another_is_named(bench: Bench) -> None:
    bench.write("m", "version_policy { specific { versions: [ 1, 3 ] } }", (1, 2, 3))
    bench.start(ControlMode.NONE)

    def version(asked: str) -> str:
        request = token_request([[7]], 1, "m")
        request.version = asked
        return bench.run(bench.service.infer(request)).version

    assert (version(""), version("1"), version("3")) == ("3", "1", "3")
    assert bench.service.model_metadata("m").versions == ["1", "3"]
    assert bench.service.model_metadata("m", "1").versions == ["1"]
    for asked, kind, message in (
        ("2", ErrorKind.NOT_FOUND, "Request for unknown model: 'm' version 2 is not found"),
        *(
            (
                wrong,
                ErrorKind.INVALID,
                f"failed to get model version from specified version string '{wrong}' (details: stol), version should "
                "be an integral value > 0",
            )
            for wrong in ("x", "1_0", "\N{ARABIC-INDIC DIGIT ONE}", "1 ", "--1")
        ),
    ):
        request = token_request([[7]], 1, "m")
        request.version = asked
        assert bench.fails(bench.service.infer(request)) == (kind, message)
    assert not bench.service.is_model_ready("m", "2")
    assert not bench.service.is_model_ready("m", "0")
    for wrong in ("x", "-1"):
        with pytest.raises(ServiceError, match="version should be an integral value > 0"):
            bench.service.is_model_ready("m", wrong)


def test_nothing_is_loaded_before_it_is_requested(bench: Bench) -> None:
    bench.write("m")
    bench.write("n")
    bench.start()
    assert bench.service.index() == [ModelIndex(name="m"), ModelIndex(name="n")]
    assert bench.service.is_ready()
    unknown = (ErrorKind.NOT_FOUND, "Request for unknown model: 'm' is not found")
    assert bench.fails(bench.service.infer(token_request([[7]], 1, "m"))) == unknown
    bench.load("m")
    assert bench.answer() == [7, 8, 9, 10]
    assert bench.service.index(ready=True) == [ModelIndex(name="m", version="1", state="READY")]
    assert bench.service.index() == [ModelIndex(name="m", version="1", state="READY"), ModelIndex(name="n")]


def test_names_that_a_client_makes_up_leave_nothing(bench: Bench) -> None:
    bench.write("m")
    bench.start(ControlMode.EXPLICIT, "m")
    for number in range(20):
        failed = bench.fails(bench.service.load(f"n{number}"))
        assert failed == (
            ErrorKind.INTERNAL,
            f"failed to load 'n{number}', failed to poll from model repository",
        )
        bench.unload(f"o{number}")
    assert bench.service.is_ready()
    assert bench.service.index() == [ModelIndex(name="m", version="1", state="READY")]
    registry = bench.service._registry
    assert set(registry._locks) | registry._requested | set(registry.failures) == {"m"}


def test_models_named_at_the_start(bench: Bench) -> None:
    for name in ("m", "n", "o"):
        bench.write(name)
    bench.start(ControlMode.EXPLICIT, "m", "o")
    assert [entry.name for entry in bench.service.index(ready=True)] == ["m", "o"]
    bench.run(bench.service.close(1))
    bench.start(ControlMode.EXPLICIT, "*")
    assert [entry.name for entry in bench.service.index(ready=True)] == ["m", "n", "o"]


def test_unloading(bench: Bench) -> None:
    bench.write("m")
    bench.start(ControlMode.EXPLICIT, "m")
    bench.unload("m")
    bench.until(lambda: not bench.engines.alive)
    bench.until(lambda: bench.states() == [("m", "1", "UNAVAILABLE", "unloaded")])
    none_left = (ErrorKind.NOT_FOUND, "Request for unknown model: 'm' has no available versions")
    assert bench.fails(bench.service.infer(token_request([[7]], 1, "m"))) == none_left
    request = token_request([[7]], 1, "m")
    request.version = "1"
    not_ready = (ErrorKind.UNAVAILABLE, "Request for unknown model: 'm' version 1 is not at ready state")
    assert bench.fails(bench.service.infer(request)) == not_ready
    assert not bench.service.is_model_ready("m")
    assert bench.service.is_ready()
    with pytest.raises(ServiceError, match="has no available versions"):
        bench.service.model_config("m")
    bench.unload("m")
    bench.unload("nope")
    bench.load("m")
    assert bench.answer() == [7, 8, 9, 10]


def test_requests_under_way_finish_when_a_model_is_unloaded(bench: Bench) -> None:
    bench.write("m")
    bench.write("z", ENSEMBLE)
    bench.write("a", TEXT)
    bench.start(ControlMode.EXPLICIT, "z", "a")
    text = InferRequest("a", [tensor("text_input", "BYTES", ["x"]), tensor("max_tokens", "INT32", [15])])
    requests = [token_request([[7]], 10, "m"), token_request([[7]], 10, "z"), text]

    async def all_of_it() -> list[Any]:
        (engine,) = bench.engines.started
        engine.go.clear()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(bench.service.infer(request)) for request in requests]
            await until(lambda: engine.begun == len(tasks))
            await bench.service.unload("m")
            assert bench.service.index()[1].state == "UNLOADING"
            assert not any(task.done() for task in tasks)
            engine.go.set()
        return [task.result() for task in tasks]

    result = [values(response) for response in bench.run(all_of_it())]
    assert result[0]["output_ids"] == result[1]["output_ids"] == [[[*range(7, 18)]]]
    assert result[2]["text_output"][0].endswith("x" * 15)
    bench.until(lambda: not bench.engines.alive)


def test_a_later_step_that_is_unloaded_meanwhile_has_its_turn(bench: Bench) -> None:
    bench.write("m")
    bench.write("n")
    bench.write("z", CHAIN)
    bench.start(ControlMode.EXPLICIT, "z")

    async def ask() -> Any:
        for engine in bench.engines.started:
            engine.go.clear()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(bench.service.infer(token_request([[7]], 4, "z")))
            await until(lambda: any(engine.begun for engine in bench.engines.started))
            await bench.service.unload("m")
            for engine in bench.engines.started:
                engine.go.set()
        return task.result()

    assert values(bench.run(ask()))["output_ids"] == [[[*range(7, 13)]]]
    bench.until(lambda: len(bench.engines.alive) == 1)


def test_what_needs_another_model_serves_when_that_does(bench: Bench) -> None:
    bench.write("m")
    bench.write("z", ENSEMBLE)
    bench.write("a", TEXT)
    bench.start()
    bench.load("z")
    bench.load("a")
    assert len(bench.engines.started) == 1
    bench.unload("m")
    lacking = "it needs model 'm', which is not ready"
    bench.until(lambda: ("m", "1", "UNAVAILABLE", "unloaded") in bench.states())
    assert [state for state in bench.states() if state[0] != "m"] == [
        ("a", "1", "UNAVAILABLE", lacking),
        ("z", "1", "UNAVAILABLE", lacking),
    ]
    assert bench.fails(bench.service.infer(token_request([[7]], 1, "z"))) == (
        ErrorKind.NOT_FOUND,
        "Request for unknown model: 'z' has no available versions",
    )
    bench.load("m")
    assert bench.answer("z") == [7, 8, 9, 10]
    assert bench.service.is_model_ready("a")


def test_unloading_with_what_was_loaded_for_it(bench: Bench) -> None:
    bench.write("m")
    bench.write("z", ENSEMBLE)
    bench.start()
    bench.load("z")
    bench.unload("z")
    assert bench.answer() == [7, 8, 9, 10]
    bench.load("z")
    bench.unload("z", unload_dependents=True)
    bench.until(lambda: not bench.engines.alive)
    bench.load("m")
    bench.load("z")
    bench.unload("z", unload_dependents=True)
    assert bench.answer() == [7, 8, 9, 10]


def test_loading_again_replaces_without_a_gap(bench: Bench) -> None:
    bench.engines.pause = 0.002
    bench.write("m", "max_batch_size: 4")
    bench.write("z", ENSEMBLE)
    bench.start(ControlMode.EXPLICIT, "z")
    answered = 0

    async def ask(stop: asyncio.Event, model: str) -> None:
        nonlocal answered
        while not stop.is_set():
            response = await bench.service.infer(token_request([[7]], 5, model))
            assert values(response)["output_ids"] == [[[*range(7, 13)]]]
            answered += 1

    async def reload() -> None:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for model in ("m", "z") * 4:
                group.create_task(ask(stop, model))
            for _ in range(10):
                seen = answered
                await until(lambda seen=seen: answered > seen + 8)  # type: ignore[misc]
                await bench.service.load("m")
                assert bench.service.is_ready()
            stop.set()

    bench.run(reload())
    assert len(bench.engines.started) == 11
    bench.until(lambda: len(bench.engines.alive) == 1)


def test_versions_come_and_go_with_a_reload(bench: Bench) -> None:
    bench.write("m", "version_policy { all { } }", (1, 2))
    bench.start(ControlMode.EXPLICIT, "m")
    old = bench.engines.alive
    bench.write("m", "version_policy { specific { versions: [ 2, 3 ] } }", (3,))
    bench.load("m")
    bench.until(lambda: all(engine.closed for engine in old))
    assert bench.states() == [
        ("m", "1", "UNAVAILABLE", "unloaded"),
        ("m", "2", "READY", ""),
        ("m", "3", "READY", ""),
    ]


def test_a_reload_that_fails_leaves_what_serves(bench: Bench) -> None:
    bench.write("m", "version_policy { all { } }", (1,))
    bench.start(ControlMode.EXPLICIT, "m")
    bench.write("m", "version_policy { all { } }", (2, 3))
    bench.engines.broken = {"m/2"}
    kind, message = bench.fails(bench.service.load("m"))
    assert kind is ErrorKind.INVALID
    reason = f"{bench.root}/m/2 has no weights"
    assert message == f"load failed for model 'm': version 2 is at UNAVAILABLE state: {reason};\n"
    assert bench.answer() == [7, 8, 9, 10]
    assert bench.states() == [
        ("m", "1", "READY", ""),
        ("m", "2", "UNAVAILABLE", reason),
        ("m", "3", "UNAVAILABLE", "unloaded"),
    ]
    assert len(bench.engines.alive) == 1
    assert bench.service.failures == {"m": LoadFailure(message, 2)}
    bench.write("m", "nope: 1")
    kind, message = bench.fails(bench.service.load("m"))
    assert kind is ErrorKind.INTERNAL
    assert message.startswith("failed to load 'm', failed to poll from model repository: ")
    assert "config.pbtxt:1:1 : " in message
    assert bench.answer() == [7, 8, 9, 10]


def test_where_memory_is_short_the_old_one_ends_first(bench: Bench) -> None:
    bench.engines.pause, bench.engines.room = 0.01, 1
    bench.write("m")
    bench.start(ControlMode.EXPLICIT, "m")

    async def reload() -> Any:
        async with asyncio.TaskGroup() as group:
            under_way = group.create_task(bench.service.infer(token_request([[7]], 20, "m")))
            await until(lambda: bench.engines.started[0].begun == 1)
            await bench.service.load("m")
            assert under_way.done()
        return under_way.result()

    assert values(bench.run(reload()))["output_ids"] == [[[*range(7, 28)]]]
    assert len(bench.engines.started) == 2
    assert bench.answer() == [7, 8, 9, 10]
    bench.engines.room = 0
    kind, message = bench.fails(bench.service.load("m"))
    assert (kind, "room for 0 tokens" in message) == (ErrorKind.INVALID, True)
    assert bench.service.failures == {"m": LoadFailure(message, 1)}  # not what was given, but too little memory
    assert not bench.service.is_model_ready("m")
    bench.engines.room = 1
    bench.load("m")
    assert bench.answer() == [7, 8, 9, 10]


def test_what_cannot_be_loaded(bench: Bench) -> None:
    bench.write("broken")
    (bench.root / "noversion").mkdir()
    bench.write("selfish", with_token_model("selfish"))
    bench.write("one", with_token_model("two"))
    bench.write("two", with_token_model("one"))
    bench.write("lonely", with_token_model("nothing"))
    bench.write("confused", with_token_model("good", "preprocessing"))
    bench.write("more", with_token_model("confused"))
    bench.write("good")
    bench.engines.broken = {"broken/1"}
    bench.start()

    def failing(name: str) -> str:
        kind, message = bench.fails(bench.service.load(name))
        assert kind in (ErrorKind.INVALID, ErrorKind.INTERNAL)
        return message

    assert failing("broken") == (
        f"load failed for model 'broken': version 1 is at UNAVAILABLE state: {bench.root}/broken/1 has no weights;\n"
    )
    assert failing("noversion") == (
        "load failed for model 'noversion': at least one version must be available under the version policy of model "
        "'noversion'\n"
    )
    for name in ("nope", "", "..", "../x", "/etc", "a\0b"):
        kind, message = bench.fails(bench.service.load(name))
        assert kind is ErrorKind.INTERNAL
        assert message == f"failed to load '{name}', failed to poll from model repository"
    assert failing("selfish") == "load failed for model 'selfish': it needs itself\n"
    assert "it needs itself" in failing("one")
    assert "failed to load 'nothing'" in failing("lonely")
    assert "model 'confused' has no engine: parameter 'token_model' must name one that has" in failing("more")
    index = {entry.name: entry for entry in bench.service.index()}
    assert index["broken"].state == "UNAVAILABLE"
    assert index["broken"].reason == f"{bench.root}/broken/1 has no weights"
    assert index["noversion"].state == "UNAVAILABLE"
    assert index["noversion"].version == ""
    assert not bench.service.is_ready()
    for name in bench.service.failures:
        bench.unload(name)
    assert bench.service.is_ready()


def test_a_failure_at_the_start_is_told_and_does_not_stop_the_others(bench: Bench) -> None:
    bench.write("broken")
    bench.write("good")
    bench.write("wrong", "nope: 1")
    bench.engines.broken = {"broken/1"}
    bench.start(ControlMode.NONE)
    assert set(bench.service.failures) == {"broken", "wrong"}
    assert not bench.service.is_ready()
    assert bench.service.is_model_ready("good")


@pytest.mark.parametrize("mode", [ControlMode.NONE, ControlMode.POLL])
def test_a_model_that_fails_is_not_tried_again_for_each_that_needs_it(bench: Bench, mode: ControlMode) -> None:
    bench.write("m")
    bench.write("a", TEXT)
    bench.write("z", ENSEMBLE)
    bench.engines.broken = {"m/1"}
    bench.start(mode)
    assert len(bench.engines.tried) == 1
    assert set(bench.service.failures) == {"a", "m", "z"}
    assert all("has no weights" in failure.reason for failure in bench.service.failures.values())


def test_another_configuration_for_one_load(bench: Bench) -> None:
    bench.write("m", "max_batch_size: 4")
    bench.start(ControlMode.EXPLICIT, "m")
    bench.load("m", json.dumps({"name": "m", "max_batch_size": 2, "dynamic_batching": {"default_queue_policy": {"max_queue_size": 3}}}))  # fmt: skip  # noqa: E501
    assert bench.service.model_config("m").max_batch_size == 2
    assert bench.engines.limits[-1].max_queue_size == 3
    for wrong in ("{", '{"name": "other"}', '{"max_batch_size": -1}', '{"parameters": {"x": {"string_value": "1"}}}'):
        kind, message = bench.fails(bench.service.load("m", wrong))
        assert kind is ErrorKind.INVALID
        assert message.startswith("failed to load 'm', failed to poll from model repository: ")
    assert bench.service.model_config("m").max_batch_size == 2
    bench.load("m")
    assert bench.service.model_config("m").max_batch_size == 4


def test_a_model_of_files_that_were_sent(bench: Bench) -> None:
    bench.start()
    bench.load("fresh", "{}", {"file:2/config.ini": b"[gpt]"})
    (engine,) = bench.engines.started
    folder = Path(engine.config.model)
    assert (folder / "config.ini").read_bytes() == b"[gpt]"
    assert bench.answer("fresh") == [7, 8, 9, 10]
    assert bench.states() == [("fresh", "2", "READY", "")]
    bench.load("fresh", "{}", {"file:3/config.ini": b"[gpt]"})
    bench.until(lambda: not folder.exists())
    assert [entry.version for entry in bench.service.index(ready=True)] == ["3"]


def touch(path: Path) -> None:
    """Let the folder look changed, however coarse the file system's clock is."""
    later = max(each.stat().st_mtime_ns for each in (path, *path.rglob("*"))) + 10**7
    os.utime(path, ns=(later, later))


def test_polling_follows_the_repository(bench: Bench) -> None:
    bench.write("m", "max_batch_size: 4")
    bench.write("z", ENSEMBLE)
    bench.write("a", TEXT)
    bench.start(ControlMode.POLL, repository_poll_secs=0.02)
    assert len(bench.engines.started) == 1
    assert bench.answer("z") == [7, 8, 9, 10]
    bench.write("m", "max_batch_size: 2")
    touch(bench.root / "m")
    bench.until(lambda: bench.service.model_config("m").max_batch_size == 2)
    bench.write("n", versions=(5,))
    bench.until(lambda: bench.service.is_model_ready("n", "5"))
    (bench.root / "n" / "6").mkdir()
    touch(bench.root / "n")
    bench.until(lambda: bench.service.is_model_ready("n", "6"))
    bench.write("m", "nope: 1")
    touch(bench.root / "m")
    bench.until(lambda: "m" in bench.service.failures)
    assert bench.answer() == [7, 8, 9, 10]
    assert bench.service.is_ready()
    for path in sorted((bench.root / "n").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (bench.root / "n").rmdir()
    bench.until(lambda: not bench.service.is_model_ready("n"))
    started = len(bench.engines.started)
    bench.run(asyncio.sleep(0.1))
    assert len(bench.engines.started) == started


def test_models_in_memory_in_every_mode(bench: Bench) -> None:
    for mode in ControlMode:
        bench.serve(MemoryRepository([parse_config('name: "m"', "x")]), mode, "m")
        assert bench.answer() == [7, 8, 9, 10]
        bench.run(bench.service.close(1))


def test_a_caller_that_leaves_does_not_stop_a_load(bench: Bench) -> None:
    bench.write("m")
    bench.start()
    bench.engines.gate.clear()

    async def leave() -> None:
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(bench.service.load("m"))
            await until(lambda: bench.service.index()[0].state == "LOADING")
            assert not bench.service.is_ready()
            loading.cancel()

    bench.run(leave())
    bench.engines.gate.set()
    bench.until(lambda: bench.service.is_model_ready("m"))


def test_unloading_waits_for_no_load_whose_caller_has_left(bench: Bench) -> None:
    bench.write("m")
    bench.write("t", TEXT)
    bench.start()
    bench.engines.gate.clear()

    async def check() -> None:
        """One load is under way for `t`, two more wait behind it; their callers leave before the unload or after."""
        for left_before in (3, 1, 0):
            loads = [asyncio.ensure_future(bench.service.load(name)) for name in ("t", "m", "m")]
            await until(lambda: bench.service.index()[0].state == "LOADING")
            for load in loads[:left_before]:
                load.cancel()
            await asyncio.sleep(0)
            unload = asyncio.ensure_future(bench.service.unload("m"))
            for load in loads:
                assert left_before == 3 or not unload.done()
                await asyncio.sleep(0)
                load.cancel()
            await asyncio.wait_for(unload, LIMIT_S)
            assert [(entry.state, entry.reason) for entry in bench.service.index() if entry.name == "m"] == [
                ("UNAVAILABLE", "unloaded")
            ]

    bench.run(check())
    assert not bench.engines.tried
    bench.engines.gate.set()
    bench.run(bench.service.load("t"))
    assert bench.service.is_model_ready("t")


def test_unloading_waits_for_a_load_whose_caller_waits(bench: Bench) -> None:
    bench.write("m")
    bench.start()
    bench.engines.gate.clear()

    async def check() -> None:
        load = asyncio.ensure_future(bench.service.load("m"))
        await until(lambda: bench.service.index()[0].state == "LOADING")
        unload = asyncio.ensure_future(bench.service.unload("m"))
        await asyncio.sleep(0.1)
        assert not unload.done()
        bench.engines.gate.set()
        await load
        await unload

    bench.run(check())
    assert not bench.service.is_model_ready("m")


def test_loads_of_one_model_come_one_after_another(bench: Bench) -> None:
    bench.write("m")
    bench.write("z", ENSEMBLE)
    bench.start()

    async def at_once() -> None:
        await asyncio.gather(*(bench.service.load(name) for name in ("z", "z", "z")))

    bench.run(at_once())
    assert len(bench.engines.started) == 1
    bench.run(_wait(asyncio.wait_for(_gathered(bench, ["m"] * 3), LIMIT_S)))
    bench.until(lambda: len(bench.engines.alive) == 1)
    assert len(bench.engines.started) == 4


async def _gathered(bench: Bench, names: list[str]) -> None:
    await asyncio.gather(*(bench.service.load(name) for name in names))


def test_an_engine_that_is_away_makes_the_model_unready(bench: Bench) -> None:
    bench.write("m")
    bench.write("z", ENSEMBLE)
    bench.start(ControlMode.EXPLICIT, "z")
    bench.engines.started[0].ready = False
    assert not bench.service.is_ready()
    assert not bench.service.is_model_ready("m")
    assert not bench.service.is_model_ready("z")
    assert bench.states()[0] == ("m", "1", "UNAVAILABLE", "its engine is starting again")
    bench.engines.started[0].ready = True
    assert bench.service.is_ready()


def test_closing_lets_requests_finish_and_takes_no_more(bench: Bench) -> None:
    bench.write("m")
    bench.start(ControlMode.EXPLICIT, "m")

    async def close() -> Any:
        (engine,) = bench.engines.started
        engine.go.clear()
        async with asyncio.TaskGroup() as group:
            under_way = group.create_task(bench.service.infer(token_request([[7]], 10, "m")))
            await until(lambda: engine.begun == 1)
            closing = group.create_task(bench.service.close(100))
            await asyncio.sleep(0)
            assert not bench.service.is_ready()
            with pytest.raises(
                ServiceError, match="Server is stopping, scheduler for model has stopped accepting"
            ) as caught:
                await bench.service.infer(token_request([[7]], 10, "m"))
            assert caught.value.kind is ErrorKind.UNAVAILABLE
            assert not closing.done()
            engine.go.set()
            await closing
            assert under_way.done()
        return under_way.result()

    assert values(bench.run(close()))["output_ids"] == [[[*range(7, 18)]]]
    assert not bench.engines.alive
    bench.run(bench.service.close(0))


def test_closing_waits_no_longer_than_it_may(bench: Bench) -> None:
    bench.write("m")
    bench.start(ControlMode.EXPLICIT, "m")

    async def close() -> None:
        (engine,) = bench.engines.started
        engine.go.clear()
        async with asyncio.TaskGroup() as group:
            under_way = group.create_task(bench.service.infer(token_request([[7]], 10, "m")))
            await until(lambda: engine.begun == 1)
            await bench.service.close(0.1)
            assert not under_way.done()
            under_way.cancel()

    bench.run(close())
    assert not bench.engines.alive


def test_closing_gives_up_what_is_being_loaded(bench: Bench) -> None:
    bench.write("m")
    bench.start()
    bench.engines.gate.clear()

    async def close() -> None:
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(bench.service.load("m"))
            await until(lambda: bench.service.index()[0].state == "LOADING")
            await bench.service.close(1000)
            await asyncio.gather(loading, return_exceptions=True)

    bench.run(close())
    assert not bench.engines.started


def test_what_nobody_foresaw_is_logged_and_not_shown(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.write("m")
    bench.write("z", ENSEMBLE)
    bench.start(ControlMode.EXPLICIT, "z")
    bench.engines.started[0].fault = ValueError("a secret of the server")
    for model, prefix in (("m", ""), ("z", "in ensemble 'z', ")):
        kind, message = bench.fails(bench.service.infer(token_request([[7]], 3, model)))
        assert kind is ErrorKind.INTERNAL
        assert message == f"{prefix}model 'm' failed; the server's log says more"
    assert "a secret of the server" in caplog.text
    assert bench.service.counters["m", "1"].failures[FailureReason.OTHER] == 2
    bench.engines.started[0].fault = None
    assert bench.answer("z") == [7, 8, 9, 10]
