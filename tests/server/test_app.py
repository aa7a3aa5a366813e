import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc as grpcclient
from google.protobuf import text_format
from tests.server.loop_thread import LoopThread
from tests.server.running import created, running
from tests.waiting import LIMIT_S

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.server import app
from hasten.server.app import Server
from hasten.server.listeners import open_port
from hasten.server.options import (
    EndpointOptions,
    ModelOptions,
    RepositoryOptions,
    SecurityOptions,
    ServeOptions,
    ServerOptions,
)
from hasten.server.tables import backend_table, table

LOCAL: dict[str, Any] = {"http_address": "127.0.0.1", "grpc_address": "127.0.0.1"}
FREE = EndpointOptions(http_port=0, grpc_port=0, metrics_port=0, **LOCAL)
EXPLICIT = RepositoryOptions(model_control_mode="explicit")


def options(folder: Path, **parts: Any) -> ServeOptions:
    return ServeOptions(model_repository=(str(folder),), **{"endpoints": FREE, "repository": EXPLICIT, **parts})


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Server]:
    """A server without models, with a key."""
    (tmp_path / "keys").write_text("secret\n")
    (tmp_path / "models").mkdir()
    security = SecurityOptions(api_key_file=str(tmp_path / "keys"))
    with running(options(tmp_path / "models", security=security)) as server:
        yield server


def test_all_doors_are_open(empty: Server) -> None:
    assert empty.http is not None
    assert empty.metrics is not None
    assert empty.grpc is not None
    with httpx.Client(base_url=f"http://{empty.http.address}") as client:
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/").headers["content-type"].startswith("text/html")
        assert [client.get(path).status_code for path in ("/health", "/ping")] == [200, 200]
        for path in ("/v2", "/v1/models", "/state", "/metrics", "/version"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"x-api-key": "secret"}).status_code == 200
    metrics = httpx.get(f"http://{empty.metrics.address}/metrics")
    assert metrics.headers["content-type"] == "text/plain; charset=utf-8"
    assert "nv_cpu_memory_total_bytes " in metrics.text
    assert httpx.get(f"http://{empty.metrics.address}/v2").status_code == 404
    with grpcclient.InferenceServerClient(empty.grpc.address) as client:
        assert client.is_server_ready()


def test_what_is_not_allowed_is_not_served(thread: LoopThread, tmp_path: Path) -> None:
    ends = EndpointOptions(http_port=0, allow_grpc=False, allow_metrics=False, **LOCAL)
    server = thread.run(created(options(tmp_path, endpoints=ends)))
    thread.run(server.start())
    assert server.grpc is None
    assert server.metrics is None
    assert server.http is not None
    assert httpx.get(f"http://{server.http.address}/metrics").status_code == 404
    thread.run(server.stop(0))
    thread.run(server.stop(0))  # once more does no harm


def test_a_port_in_use_leaves_nothing_open(thread: LoopThread, tmp_path: Path) -> None:
    with open_port("127.0.0.1", 0, "--x") as taken:
        port = taken.getsockname()[1]
        for name in ("http", "grpc", "metrics"):
            ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, f"{name}_port": port}
            with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port} \(--{name}-port\): Address alr"):
                thread.run(created(options(tmp_path, endpoints=EndpointOptions(**ports, **LOCAL))))


def test_a_model_that_cannot_be_loaded_ends_the_server_if_that_is_wanted(
    thread: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.pbtxt").write_text("nonsense { }")
    server = thread.run(created(options(tmp_path, repository=RepositoryOptions())))
    with pytest.raises(ConfigError, match="not all models could be loaded: broken"):
        thread.run(server.start())
    thread.run(server.stop(0))
    lenient = ServerOptions(exit_on_error=False)
    server = thread.run(created(options(tmp_path, repository=RepositoryOptions(), server=lenient)))
    with caplog.at_level(logging.INFO, "hasten"):
        thread.run(server.start())
    assert server.http is not None
    assert httpx.get(f"http://{server.http.address}/v2/health/live").status_code == 200
    assert httpx.get(f"http://{server.http.address}/v2/health/ready").status_code == 400
    assert httpx.get(f"http://{server.http.address}/health").status_code == 503
    thread.run(server.stop(0))
    messages = [record.getMessage() for record in caplog.records]
    assert any("| broken" in message and "UNAVAILABLE: " in message for message in messages)
    assert any(message.startswith("Started HTTPService at 127.0.0.1:") for message in messages)


def test_what_is_loaded_and_where_it_is_served_is_said(
    thread: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = thread.run(created(options(tmp_path)))
    with caplog.at_level(logging.DEBUG, "hasten"):
        thread.run(server.start())
    assert server.http is not None
    thread.run(server.stop(0))
    verbose = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert any("| max_request_bytes " in line for line in verbose)
    lines = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    url = f"http://localhost:{server.http.port}/"
    assert lines[0] == f"loading {tmp_path} ..."
    assert lines[-1] == f"ready: page at {url}, OpenAI's API at {url}v1"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"no model in {tmp_path}: each is a folder NAME with config.pbtxt"


def test_limits_of_one_model_are_put_into_its_configuration(demo_model: Path) -> None:
    engine = EngineConfig.create(str(demo_model))
    limits = ModelOptions(name="tokens", text_name="words", max_batch=3, max_queue_size=7, queue_timeout_secs=1.5)
    repository = app._repository(ServeOptions(engine=engine, model=limits))
    assert repository.names() == ["ensemble", "postprocessing", "preprocessing", "tokens", "words"]
    tokens, ensemble = (repository.describe(name) for name in ("tokens", "ensemble"))
    assert tokens is not None
    assert ensemble is not None
    assert (tokens.config.max_batch_size, ensemble.config.max_batch_size) == (3, 3)
    policy = tokens.config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (7, 1_500_000)
    assert "dynamic_batching" not in text_format.MessageToString(ensemble.config)


def test_messages_over_grpc_have_a_limit_of_their_own() -> None:
    name = "grpc.max_receive_message_length"
    assert dict(EndpointOptions().grpc_channel(SecurityOptions()))[name] == 32 << 20
    assert dict(EndpointOptions().grpc_channel(SecurityOptions(max_request_bytes=1000)))[name] == 1000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either a MODEL or --model-repository"),
        ({"engine": EngineConfig.create("m"), "model_repository": ("r",)}, "give either a MODEL or --model-repository"),
        ({"model_repository": ("r",), "repository": {"load_model": ("m",)}}, "--load-model needs --model-control-mode"),
        ({"model_repository": ("r",), "endpoints": {"http_port": 70000}}, "--http-port must be from 0 to 65535"),
        ({"model_repository": ("r",), "endpoints": {"allow_http": False, "allow_grpc": False}}, "nothing is served"),
        (
            {"model_repository": ("r",), "endpoints": {"metrics_interval_ms": -1}},
            "--metrics-interval-ms must be at least",
        ),
        (
            {"model_repository": ("r",), "repository": {"repository_poll_secs": 0}},
            "--repository-poll-secs must be above",
        ),
        ({"model_repository": ("r",), "server": {"exit_timeout_secs": -1}}, "--exit-timeout-secs must be at least 0"),
        (
            {
                "model_repository": ("r",),
                "repository": {"model_control_mode": "explicit", "load_model": ("*", "m")},
            },
            r"--load-model=\* loads all models",
        ),
        ({"model_repository": ("r",), "security": {"max_request_bytes": 0}}, "--max-request-bytes must be at least 1"),
        (
            {"model_repository": ("r",), "security": {"max_inflight_bytes": 100, "max_request_bytes": 101}},
            r"--max-inflight-bytes must be at least --max-request-bytes \(101\), got 100",
        ),
        ({"engine": EngineConfig.create("m"), "model": {"max_batch": 0}}, "--max-batch must be at least 1"),
    ],
)
def test_options_that_make_no_server_are_refused(given: dict[str, Any], message: str) -> None:
    kinds = {"repository": RepositoryOptions, "endpoints": EndpointOptions, "security": SecurityOptions}
    kinds |= {"model": ModelOptions, "server": ServerOptions}
    with pytest.raises(ConfigError, match=message):
        ServeOptions(**{name: kinds[name](**part) if name in kinds else part for name, part in given.items()})


def test_a_table_has_a_frame() -> None:
    assert table(("Model", "Version"), [("add", "1")]).splitlines() == [
        "+-------+---------+",
        "| Model | Version |",
        "+-------+---------+",
        "| add   | 1       |",
        "+-------+---------+",
    ]


def test_what_computes_which_models() -> None:
    assert backend_table({"fastertransformer": ["m"], "hasten": ["before", "text"]}).splitlines()[1:-1] == [
        "| Backend           | Models      |",
        "+-------------------+-------------+",
        "| fastertransformer | m           |",
        "| hasten            | before text |",
    ]


def test_a_server_whose_start_takes_long_lives_meanwhile(thread: LoopThread, tmp_path: Path) -> None:
    server = thread.run(created(options(tmp_path)))
    assert server.http is not None
    loading = asyncio.Event()

    async def slow(*_: Any, **__: Any) -> None:
        await loading.wait()

    server.service.start = slow  # type: ignore[method-assign]
    starting = asyncio.run_coroutine_threadsafe(server.start(), thread.loop)
    with httpx.Client(base_url=f"http://{server.http.address}", transport=httpx.HTTPTransport(retries=3)) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 400
    assert not starting.done()
    thread.loop.call_soon_threadsafe(loading.set)
    starting.result(LIMIT_S)
    thread.run(server.stop(0))
