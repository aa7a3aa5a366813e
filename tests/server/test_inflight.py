"""The bytes of all requests in flight, over both transports: those that there is no room for are refused."""

import gzip
import json
import socket
from collections.abc import Iterator

import grpc
import httpx
import numpy as np
import pytest
from tests.server.transport_fixtures import Transports, refusal, serving
from tests.waiting import LIMIT_S, eventually
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from hasten.server.by_size import SMALL
from hasten.server.inflight import InflightBytes
from hasten.server.types import ErrorKind, ServiceError

LIMIT = 300_000
VALUES = 50_000
FULL = r"requests of \d+ bytes are in flight, and the limit is 300000 \(--max-inflight-bytes\); try again later"


@pytest.fixture(scope="module")
def site() -> Iterator[Transports]:
    with serving(Transports(inflight=InflightBytes(LIMIT))) as site:
        yield site


@pytest.fixture
def full(site: Transports) -> Iterator[None]:
    """Meanwhile other requests leave no room."""
    with site.inflight.claim() as claim:
        claim.grow(LIMIT + SMALL)
        yield
    eventually(lambda: site.inflight.held == 0)


@pytest.fixture(scope="module")
def client(site: Transports) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{site.http}", timeout=LIMIT_S) as client:
        yield client


def test_a_request_holds_its_bytes_beyond_the_first_until_it_ends() -> None:
    inflight = InflightBytes(100)
    with inflight.claim() as each, inflight.claim() as other:
        each.grow(SMALL - 1)
        assert inflight.held == 0
        each.grow(61)
        assert inflight.held == 60
        other.grow(SMALL)
        other.grow(40)
        assert inflight.held == 100
        with pytest.raises(ServiceError, match="requests of 100 bytes are in flight, and the limit is 100") as error:
            each.grow(1)
        assert error.value.kind is ErrorKind.EXHAUSTED
        assert (inflight.held, inflight.refusals) == (100, 1)
    assert inflight.held == 0


def test_a_request_that_was_given_up_holds_nothing_that_a_thread_still_reads() -> None:
    inflight = InflightBytes(100)
    with inflight.claim() as claim:
        claim.grow(SMALL + 60)
    with pytest.raises(ServiceError) as error:
        claim.grow(SMALL + 60)
    assert error.value.kind is ErrorKind.CANCELLED
    assert inflight.held == 0


def infer_body(first: float, values: int) -> bytes:
    tensor = {"datatype": "FP32", "shape": [1, values]}
    inputs = [tensor | {"name": "INPUT0", "data": [first] * values}, tensor | {"name": "INPUT1", "data": [1] * values}]
    return json.dumps({"inputs": inputs}).encode()


def test_a_body_is_held_until_its_answer(site: Transports, client: httpx.Client) -> None:
    body = infer_body(-2, VALUES)
    with socket.create_connection(("127.0.0.1", site.http_listener.port)) as slow:
        head = f"POST /v2/models/add/infer HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        eventually(lambda: site.inflight.held == len(body) - SMALL)
    eventually(lambda: site.inflight.held == 0)
    assert client.post("/v2/models/add/infer", content=infer_body(1, VALUES // 2)).status_code == 200
    eventually(lambda: site.inflight.held == 0)  # a moment after the answer


@pytest.mark.usefixtures("full")
def test_small_requests_are_taken_all_the_same(client: httpx.Client) -> None:
    assert client.post("/v2/models/add/infer", content=infer_body(1, 2)).status_code == 200
    assert client.get("/v2/health/live").status_code == 200


@pytest.mark.usefixtures("full")
def test_a_body_is_refused_before_it_is_sent(site: Transports) -> None:
    refusals = site.inflight.refusals
    with socket.create_connection(("127.0.0.1", site.http_listener.port)) as sock:
        sock.sendall(b"POST /v2/models/add/infer HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        sock.settimeout(LIMIT_S)
        answer = b""
        while b"}" not in answer:
            answer += sock.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer
    assert b"--max-inflight-bytes" in answer
    assert site.inflight.refusals == refusals + 1


@pytest.mark.usefixtures("full")
def test_a_body_of_no_declared_size_is_refused_as_it_comes(client: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(10_000)

    answer = client.post("/v2/models/add/infer", content=pieces())
    assert "--max-inflight-bytes" in refusal(answer, 503)
    assert answer.headers["retry-after"] == "1"


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("path", ["add/infer", "id_fp32/generate"])
def test_what_is_unpacked_counts(client: httpx.Client, path: str) -> None:
    packed = gzip.compress(b" " * 200_000)
    assert len(packed) < SMALL
    answer = client.post(f"/v2/models/{path}", content=packed, headers={"content-encoding": "gzip"})
    assert "--max-inflight-bytes" in refusal(answer, 503)


def message(values: int, request_id: str = "") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="add", id=request_id)
    for name in ("INPUT0", "INPUT1"):
        request.inputs.add(name=name, datatype="FP32", shape=[1, values])
        request.raw_input_contents.append(np.ones(values, np.float32).tobytes())
    return request


@pytest.mark.usefixtures("full")
def test_messages_are_refused_over_grpc(site: Transports) -> None:
    with grpc.insecure_channel(site.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=FULL) as error:
            stub.ModelInfer(message(VALUES), timeout=LIMIT_S)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.ModelInfer(message(2), timeout=LIMIT_S).model_name == "add"
        refused, taken = stub.ModelStreamInfer(iter([message(VALUES, "large"), message(2, "small")]), timeout=LIMIT_S)
        assert "--max-inflight-bytes" in refused.error_message
        assert (refused.infer_response.id, taken.infer_response.id) == ("large", "small")
        assert not taken.error_message


def test_messages_are_held_until_their_answers(site: Transports) -> None:
    with grpc.insecure_channel(site.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        slow = message(20_000)
        slow.raw_input_contents[0] = np.full(20_000, -2, np.float32).tobytes()
        call = stub.ModelInfer.future(slow)
        stream = stub.ModelStreamInfer(iter([slow]))
        eventually(lambda: site.inflight.held == 2 * (slow.ByteSize() - SMALL))
        call.cancel()
        eventually(lambda: site.inflight.held == slow.ByteSize() - SMALL)
        stream.cancel()
        eventually(lambda: site.inflight.held == 0)
