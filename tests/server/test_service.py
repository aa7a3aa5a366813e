import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.engine_helpers import error_of, stopped
from tests.server.engine_helpers import until as wait_until
from tests.server.service_fixtures import (
    DEMO,
    LONGEST,
    Running,
    demo,
    streaming,
    tensor,
    token_request,
    values,
)
from tests.waiting import attempts

from hasten import __version__
from hasten.core.config import EngineConfig
from hasten.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineError,
    HastenError,
    InvalidRequestError,
    RankError,
    UnsupportedError,
)
from hasten.server.create import model_configs, write_repository
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import QueueFullError, QueueLimits, QueueTimeoutError
from hasten.server.errors import service_error
from hasten.server.repository import FolderRepository, MemoryRepository
from hasten.server.service import ControlMode, Service
from hasten.server.statistics import FailureReason
from hasten.server.types import ErrorKind, InferRequest, InferResponse, ServiceError

__all__ = ["demo", "streaming"]

PROMPTS = [[9, 10, 304, 262], [5]]
NEVER = 5000
"""An end token that never comes."""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InvalidRequestError("x"), ErrorKind.INVALID, "x"),
        (ConfigError("x"), ErrorKind.INVALID, "x"),
        (UnsupportedError("x"), ErrorKind.UNSUPPORTED, "x"),
        (CapacityError("x"), ErrorKind.UNAVAILABLE, "x"),
        (EngineError("x"), ErrorKind.UNAVAILABLE, "x"),
        (RankError("x"), ErrorKind.UNAVAILABLE, "x"),
        (CheckpointError("x"), ErrorKind.INTERNAL, "x"),
        (HastenError("x"), ErrorKind.INTERNAL, "x"),
        (QueueFullError("x"), ErrorKind.OVERLOADED, "[request id: q7] Exceeds maximum queue size: x"),
        (QueueTimeoutError("x"), ErrorKind.OVERLOADED, "[request id: q7] Request timeout expired: x"),
        (ServiceError(ErrorKind.EXHAUSTED, "x"), ErrorKind.EXHAUSTED, "x"),
    ],
)
def test_what_errors_are_to_a_client(error: HastenError, kind: ErrorKind, message: str) -> None:
    result = service_error(error, "q7")
    assert (result.kind, str(result)) == (kind, message)


def test_the_server(demo: Running) -> None:
    service = demo.service
    result = service.server_metadata()
    assert (result.name, result.version) == ("hasten", __version__)
    assert {"model_repository(unload_dependents)", "binary_tensor_data", "statistics"} <= set(result.extensions)
    assert service.is_ready()
    assert [(entry.name, entry.state) for entry in service.index(ready=True)] == [
        (name, "READY") for name in ("demo", "ensemble", "fastertransformer", "postprocessing", "preprocessing")
    ]


def test_the_models(demo: Running) -> None:
    service = demo.service
    token = service.model_metadata("fastertransformer")
    assert (token.versions, token.platform) == (["1"], "fastertransformer")
    shapes = {each.name: (each.datatype, tuple(each.shape)) for each in (*token.inputs, *token.outputs)}
    assert shapes["input_ids"] == ("UINT32", (-1, -1))
    assert shapes["input_lengths"] == ("UINT32", (-1, 1))
    assert shapes["output_ids"] == ("UINT32", (-1, -1, -1))
    text = service.model_metadata("demo")
    assert {each.name: (each.datatype, tuple(each.shape)) for each in text.inputs}["text_input"] == ("BYTES", (1,))
    assert service.model_metadata("ensemble").platform == "ensemble"
    assert [service.is_decoupled(name) for name in ("fastertransformer", "ensemble", "demo")] == [False, False, True]
    assert service.model_config("demo").backend == "hasten"
    assert list(service.engines()) == [("fastertransformer", "1")]
    for ask in (service.model_metadata, service.model_config, service.is_decoupled):
        with pytest.raises(ServiceError, match="Request for unknown model: 'nope' is not found"):
            ask("nope")


@pytest.mark.parametrize("name", ["", "..", "../demo", "/etc/passwd", "demo/../demo", "demo\0", "Demo"])
def test_names_of_no_model(demo: Running, name: str) -> None:
    error = demo.refused(InferRequest(name, []))
    assert (error.kind, str(error)) == (ErrorKind.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
    assert not demo.service.is_model_ready(name)


def test_a_response_says_whose_it_is(demo: Running) -> None:
    request = token_request(PROMPTS, 2)
    request.id = "q7"
    response = demo.run(demo.service.infer(request))
    assert (response.model, response.version, response.id, response.final) == ("fastertransformer", "1", "q7", True)
    assert demo.stream(request) == [(values(response), True)]


def test_the_servers_process_does_not_import_torch() -> None:
    code = (
        "import sys, hasten.server.service, hasten.server.create; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def used_blocks(running: Running) -> int:
    return engine(running).stats().used_blocks


def engine(running: Running) -> EngineClient:
    return running.service.engines()["fastertransformer", "1"]


def until(running: Running, true: Any) -> None:
    running.run(wait_until(true))


TEXT = InferRequest(
    "demo",
    [
        tensor("text_input", "BYTES", ["Once upon a time"]),
        tensor("stream", "BOOL", [True]),
        tensor("max_tokens", "INT32", [LONGEST]),
        tensor("end_id", "INT32", [-1]),
    ],
)
ENSEMBLE = InferRequest(
    "ensemble",
    [
        tensor("INPUT_0", "BYTES", [["Once upon a time"], ["The"]]),
        tensor("INPUT_1", "UINT32", [[LONGEST]] * 2),
        tensor("end_id", "UINT32", [[NEVER]] * 2),
    ],
)


@pytest.mark.parametrize("request_", [token_request(PROMPTS, LONGEST, end_id=NEVER), TEXT, ENSEMBLE])
def test_closing_a_stream_withdraws_the_request(streaming: Running, request_: InferRequest) -> None:
    counters = streaming.service.counters[request_.model, "1"]

    async def leave() -> int:
        for _ in attempts("a first response while the engine computes the next one"):
            before = counters.failures[FailureReason.CANCELED]
            responses = streaming.service.stream(request_)
            under_way = not (await anext(responses)).final and engine(streaming).stats().running > 0
            await responses.aclose()
            if under_way:
                break
        return before

    canceled = streaming.run(leave())
    until(streaming, lambda: used_blocks(streaming) == 0)
    assert counters.failures[FailureReason.CANCELED] == canceled + 1
    assert counters.pending == 0
    stats = engine(streaming).stats()
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_the_task_withdraws_the_request(demo: Running, stream: bool) -> None:
    def ask() -> asyncio.Task[Any]:
        if stream:
            return asyncio.create_task(_all(demo.service.stream(TEXT)))
        return asyncio.create_task(demo.service.infer(token_request(PROMPTS, LONGEST, end_id=NEVER)))

    async def leave() -> None:
        task = await seen_running(demo, ask)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    demo.run(leave())
    until(demo, lambda: used_blocks(demo) == 0)


async def seen_running(running: Running, ask: Callable[[], asyncio.Task[Any]]) -> asyncio.Task[Any]:
    """A request that the engine computes."""
    for _ in attempts("a request that runs"):
        task = ask()
        await wait_until(lambda task=task: engine(running).stats().running > 0 or task.done())  # type: ignore[misc]
        if not task.done():
            return task
        await task
    raise AssertionError


async def _all(responses: Any) -> list[InferResponse]:
    return [response async for response in responses]


def test_a_slow_reader_gets_it_all_and_holds_up_nobody(streaming: Running) -> None:
    async def slowly() -> tuple[list[InferResponse], int]:
        responses = streaming.service.stream(token_request(PROMPTS[:1], 60, end_id=NEVER))
        first = await anext(responses)
        others = 0
        while engine(streaming).stats().running:
            await _all(streaming.service.stream(token_request(PROMPTS[1:], 5)))
            others += 1
        return [first, *[response async for response in responses]], others

    for _ in attempts("other requests that are answered before that of a slow reader has ended"):
        result, others = streaming.run(slowly())
        if others > 0:
            break
    assert len(result) < 30
    assert values(result[-1])["sequence_length"] == [[64]]


def test_many_requests_at_once_give_what_each_gives_alone(demo: Running) -> None:
    requests = [
        token_request([[token]], 8, runtime_top_k=20, random_seed=token, temperature=1.5) for token in range(5, 45)
    ]

    async def at_once() -> list[InferResponse]:
        return await asyncio.gather(*(demo.service.infer(request) for request in requests))

    together = [values(response) for response in demo.run(at_once())]
    assert together == [demo.infer(request) for request in requests]


def test_queue_limits_timeouts_and_priorities() -> None:
    engine_config = EngineConfig.create(str(DEMO), max_num_seqs=1)
    configs = model_configs(engine_config, limits=QueueLimits(max_queue_size=3))[:1]
    configs[0].dynamic_batching.priority_levels = 2
    configs[0].dynamic_batching.default_priority_level = 2

    async def start() -> Service:
        service = Service(MemoryRepository(configs))
        await service.start()
        return service

    running = Running(start)
    try:
        service = running.service
        long, short = token_request([[5]], 1500, end_id=NEVER), token_request([[6]], 1)
        failures = service.counters["fastertransformer", "1"].failures

        def prioritized(priority: int) -> InferRequest:
            request = token_request([[6]], 1)
            request.parameters["priority"] = priority
            return request

        async def ask() -> tuple[list[str], ServiceError, ServiceError]:
            client = engine(running)
            order: list[str] = []

            async def named(name: str, request: InferRequest) -> None:
                await service.infer(request)
                order.append(name)

            impatient = token_request([[6]], 1)
            impatient.parameters["timeout"] = 1000
            async with asyncio.TaskGroup() as group:
                longs = [group.create_task(service.infer(long)) for _ in range(2)]
                await wait_until(lambda: (client.stats().running, client.stats().waiting) == (1, 1))
                with stopped(client):
                    late = await error_of(service.infer(impatient))
                    group.create_task(named("default", short))
                    await wait_until(lambda: client.stats().waiting == 2)
                    group.create_task(named("high", prioritized(1)))
                    await wait_until(lambda: client.stats().waiting == 3)
                    refused = await error_of(service.infer(short))
                    for task in longs:
                        task.cancel()
            assert isinstance(late, ServiceError)
            assert isinstance(refused, ServiceError)
            return order, late, refused

        order, late, refused = running.run(ask())
        assert order == ["high", "default"]
        assert late.kind is refused.kind is ErrorKind.OVERLOADED
        assert "[request id: <id_unknown>] Request timeout expired" in str(late)
        assert "[request id: <id_unknown>] Exceeds maximum queue size" in str(refused)
        assert failures[FailureReason.REJECTED] == 2
    finally:
        running.close()


def test_a_real_reload_under_real_load(tmp_path: Path) -> None:
    """From the disk, by the explicit way: nothing that was accepted is lost, and the old engine's process ends."""
    engine_config = EngineConfig.create(str(DEMO), max_model_len=LONGEST)
    write_repository(model_configs(engine_config, text_name="text", decoupled=True), tmp_path, engine_config)

    async def start() -> Service:
        service = Service(FolderRepository([tmp_path]), mode=ControlMode.EXPLICIT)
        await service.start(["ensemble", "text"])
        return service

    running = Running(start)
    try:
        service = running.service
        assert running.service.is_ready()
        old = engine(running)
        expected = running.stream(token_request(PROMPTS, 12))[-1][0]
        answered = dict.fromkeys(("fastertransformer", "text", "ensemble"), 0)
        text = InferRequest("text", [tensor("text_input", "BYTES", ["The cat"]), tensor("max_tokens", "INT32", [6])])
        texts = InferRequest(
            "ensemble", [tensor("INPUT_0", "BYTES", [["The cat"]]), tensor("INPUT_1", "UINT32", [[6]])]
        )

        async def ask(request: InferRequest, stop: asyncio.Event) -> None:
            while not stop.is_set():
                responses = await _all(service.stream(request))
                assert responses[-1].final
                if request.model == "fastertransformer":
                    assert values(responses[-1]) == expected
                answered[request.model] += 1

        async def reload() -> None:
            stop = asyncio.Event()
            requests = (token_request(PROMPTS, 12), text, texts)
            async with asyncio.TaskGroup() as group:
                for request in requests * 2:
                    group.create_task(ask(request, stop))
                await wait_until(lambda: min(answered.values()) > 0)
                await service.load("fastertransformer")
                seen = dict(answered)
                await wait_until(lambda: all(answered[name] > seen[name] for name in answered))
                stop.set()

        running.run(reload())
        assert engine(running) is not old
        assert min(answered.values()) > 1
        until(running, lambda: not old.ready)
        running.run(service.unload("text"))
        running.run(service.unload("ensemble", unload_dependents=True))
        until(running, lambda: len(service.index(ready=True)) == 1)  # the one that was loaded for its own sake
        running.run(service.unload("fastertransformer"))
        until(running, lambda: {entry.state for entry in service.index()} == {"UNAVAILABLE"})
        assert not service.engines()
    finally:
        running.close()


def test_a_killed_engine_fails_what_it_computed_and_comes_back() -> None:
    async def start() -> Service:
        configs = model_configs(EngineConfig.create(str(DEMO)), text_name="text")
        service = Service(MemoryRepository(configs))
        await service.start()
        return service

    running = Running(start)
    try:
        service = running.service

        async def kill() -> None:
            request = token_request(PROMPTS, 1500, end_id=NEVER)
            under_way = await seen_running(running, lambda: asyncio.create_task(error_of(service.infer(request))))
            pid = engine(running).replicas[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            error = await under_way
            assert isinstance(error, ServiceError)
            assert error.kind is ErrorKind.UNAVAILABLE
            assert not service.is_ready()
            assert not service.is_model_ready("text")
            states = {entry.name: (str(entry.state), entry.reason) for entry in service.index()}
            assert states["fastertransformer"] == ("UNAVAILABLE", "its engine is starting again")

        running.run(kill())
        assert service.counters["fastertransformer", "1"].failures[FailureReason.BACKEND] == 1
        until(running, service.is_ready)
        assert running.infer(token_request(PROMPTS, 4))["sequence_length"] == [[8], [5]]
    finally:
        running.close()
