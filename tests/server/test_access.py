"""What the server says of each call, over both transports."""

import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from tests.server.running import running
from tests.server.test_app import options
from tests.waiting import eventually
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from hasten import __version__
from hasten.server.app import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without models."""
    folder: Path = tmp_path_factory.mktemp("models")
    with running(options(folder)) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    assert server.http is not None
    with httpx.Client(base_url=f"http://{server.http.address}") as client:
        yield client


@pytest.fixture
def stub(server: Server) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    assert server.grpc is not None
    with grpc.insecure_channel(server.grpc.address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def count(http: httpx.Client, api: str, status: str) -> int:
    """Calls so far, as the metrics have them."""
    label = f'hasten_api_calls_total{{api="{api}",status="{status}"}} '
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(label)]
    return int(lines[0].removeprefix(label)) if lines else 0


def test_a_call_over_http_keeps_its_id_or_gets_one(http: httpx.Client) -> None:
    assert http.get("/v2", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    first, second = (http.get("/v2").headers["x-request-id"] for _ in range(2))
    assert first != second
    for odd in (b"", b"a b", b"\xff", b"x" * 129):
        given = http.get("/v2", headers=[(b"x-request-id", odd)]).headers["x-request-id"]
        assert given.encode() != odd
        assert len(given) == 16


def test_a_call_over_grpc_keeps_its_id_or_gets_one(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    request = pb.ServerMetadataRequest()
    _, call = stub.ServerMetadata.with_call(request, metadata=(("x-request-id", "mine-2"),))
    assert dict(call.trailing_metadata())["x-request-id"] == "mine-2"
    _, call = stub.ServerMetadata.with_call(request)
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 16
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelMetadata(pb.ModelMetadataRequest(name="x"), metadata=(("x-request-id", "mine-3"),))
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine-3"


def test_failures_of_every_api_are_counted(http: httpx.Client, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    kinds = [
        *(("openai", "404"), ("openai", "400"), ("triton_http", "200"), ("triton_http", "404"), ("probe", "200")),
        *(("page", "200"), ("triton_grpc", "NOT_FOUND"), ("triton_grpc", "OK"), ("other", "404")),
    ]
    before = {kind: count(http, *kind) for kind in kinds}
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="saga", prompt="a")
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="saga", prompt="a", extra_body={"colour": 1})
    for path in ("/v2", "/v2/models/saga", "/health", "/", "/nothing"):
        http.get(path)
    with pytest.raises(grpc.RpcError):
        stub.ModelMetadata(pb.ModelMetadataRequest(name="saga"))
    stub.ServerMetadata(pb.ServerMetadataRequest())
    stream = stub.ModelStreamInfer(iter([pb.ModelInferRequest(model_name="saga")]))
    assert "saga" in next(stream).error_message
    assert list(stream) == []
    expected = {kind: before[kind] + (2 if kind == ("triton_grpc", "OK") else 1) for kind in kinds}

    def after() -> dict[tuple[str, str], int]:
        return {kind: count(http, *kind) for kind in kinds}

    eventually(lambda: after() == expected, lambda: str(after()))  # a call is counted once it is over


def test_calls_are_logged_for_those_who_want_to_see_each(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "hasten.server.access"):
        http.get("/v2/models/a%0Ab", headers={"x-request-id": "mine-4"})
        http.get("/v2")  # by now the first one is logged
    (line,) = [record.getMessage() for record in caplog.records if "mine-4" in record.getMessage()]
    head, _, rest = line.partition(" in ")
    assert head == "HTTP GET /v2/models/a%0Ab 404"
    assert rest.endswith(" ms, request id mine-4")
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


def test_the_build_and_other_servers_routes(http: httpx.Client) -> None:
    assert f'hasten_build_info{{version="{__version__}"}} 1\n' in http.get("/metrics").text
    assert http.get("/version").json() == {"version": __version__}
    assert [http.get(path).status_code for path in ("/health", "/ping")] == [200, 200]
