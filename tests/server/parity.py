"""A real Triton and hasten side by side: the same request to both, and their answers in a form to compare."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from google.protobuf import json_format
from tests.server.serve_process import serve_process
from tests.server.tritonserver import TritonServer
from tests.waiting import LIMIT_S
from tritonclient.grpc import service_pb2_grpc

HEADER_LENGTH = "inference-header-content-length"
_SUFFIX = re.compile(r" \(input '\w+'\)")


@dataclass(frozen=True)
class Ask:
    """One exchange over HTTP."""

    path: str
    body: Any = b""
    """JSON, or bytes."""
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "POST"


@dataclass(frozen=True)
class Answer:
    """What came back. Over gRPC the status is the code's name, and there are no headers."""

    status: int | str
    body: Any
    """JSON as plain values, the error's text, or what is neither."""
    headers: tuple[str, ...] = ()
    """Content type and encoding; where the body is a tensor, that too."""

    def __str__(self) -> str:
        return f"{self.status} {self.body}"


class Side:
    """Clients of one server."""

    def __init__(self, http: str, grpc_place: str, metrics: str = "") -> None:
        self.http_place, self.grpc_place, self.metrics = http, grpc_place, metrics
        self._web = httpx.Client(base_url=f"http://{http}", timeout=LIMIT_S)
        self._channel = grpc.insecure_channel(grpc_place)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def http(self, ask: Ask) -> Answer:
        """The answer to one request over HTTP."""
        content = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
        response = self._web.request(ask.method, ask.path, content=content, headers=list(ask.headers))
        kind = response.headers.get("content-type", "")
        body = response.content
        if response.is_error:
            return Answer(response.status_code, _error(body))
        headers = (kind, response.headers.get("content-encoding", "")) if body else ()
        if HEADER_LENGTH in response.headers:
            length = int(response.headers[HEADER_LENGTH])
            return Answer(response.status_code, (json.loads(body[:length]), body[length:]), headers)
        if kind.startswith("text/event-stream"):
            events = body.decode().removesuffix("\n\n").split("\n\n")
            return Answer(response.status_code, [_json(event.removeprefix("data: ")) for event in events], headers)
        return Answer(response.status_code, _json(body), headers)

    def call(self, name: str, message: Any) -> Answer:
        """The answer to one call over gRPC."""
        try:
            return Answer("OK", plain(getattr(self._stub, name)(message, timeout=LIMIT_S)))
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())

    def stream(self, *messages: Any) -> list[Any]:
        """All that comes back from one stream."""
        return [plain(message) for message in self._stub.ModelStreamInfer(iter(messages), timeout=LIMIT_S)]

    def stream_status(self, *messages: Any) -> tuple[list[Any], str, str]:
        """What comes back from one stream whose first error is its status, and that status with its text."""
        found: list[Any] = []
        call = self._stub.ModelStreamInfer(iter(messages), timeout=LIMIT_S, metadata=(("triton_grpc_error", "true"),))
        try:
            for message in call:
                found.append(plain(message))
        except grpc.RpcError:
            pass
        return found, call.code().name, call.details()

    def close(self) -> None:
        """Close the connections."""
        self._web.close()
        self._channel.close()


def plain(message: Any) -> Any:
    """A message of protobuf as plain values."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _json(body: bytes | str) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body


def _error(body: bytes) -> str:
    """An error's text, without the input that hasten names where Triton does not; Triton has errors as events too."""
    found = _json(body.removeprefix(b"data: "))
    return _SUFFIX.sub("", found["error"]) if isinstance(found, dict) else body.decode()


def same(theirs: Answer, ours: Answer) -> bool:
    """Whether two answers are the same. What Triton calls its own fault and is the client's has status 400 here."""
    if (theirs.status, ours.status) == (500, 400):
        return bool(theirs.body == ours.body)
    return theirs == ours


@contextmanager
def hasten_serve(repository: Path, log: Path) -> Iterator[Side]:
    """`hasten serve` of all models of a repository, in control mode explicit."""
    models = ("--model-repository", str(repository), "--model-control-mode", "explicit", "--load-model", "*")
    with serve_process(log, *models, "--allow-client-shm") as indices:
        side = Side(indices["HTTPService"], indices["GRPCInferenceService"], indices["Metrics"])
        yield side
        side.close()


@contextmanager
def triton_side(server: TritonServer) -> Iterator[Side]:
    """The clients of a Triton that runs."""
    side = Side(f"127.0.0.1:{server.http_port}", server.url, f"127.0.0.1:{server.metrics_port}")
    yield side
    side.close()
