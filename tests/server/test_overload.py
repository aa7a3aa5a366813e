"""A server with more work than it can do in time, asked by the clients that there are."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from prometheus_client.parser import text_string_to_metric_families
from tests.server.serve_process import serve_process
from tests.waiting import eventually
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
TEXT, TOKENS = "story", "fastertransformer"
MANY = 40
LONG: dict[str, Any] = {"prompt": ["Anna"] * MANY, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
"""Seconds of work for the fastest engine."""
MAY_WAIT_US = 50_000
IMPATIENT = {"x-queue-timeout-ms": str(MAY_WAIT_US // 1000)}


class Busy:
    """A server that runs one sequence, and has many to run."""

    def __init__(self, places: dict[str, str]) -> None:
        self.http, self.grpc = f"http://{places['HTTPService']}", places["GRPCInferenceService"]
        self.openai = openai.OpenAI(base_url=f"{self.http}/v1", api_key="none", max_retries=0)
        self._stream: Any = None

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the token model; 0 where there is none."""
        text = httpx.get(f"{self.http}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
        return found[0] if found else 0.0

    def occupy(self) -> None:
        """Wait until whoever came now would wait for much longer than the impatient do."""
        if self.metric("hasten_estimated_wait_seconds") > 50 * MAY_WAIT_US / 1e6:
            return
        self.leave()
        self._stream = self.openai.completions.create(model=TEXT, **LONG, stream=True)
        eventually(lambda: self.metric("hasten_estimated_wait_seconds") > 50 * MAY_WAIT_US / 1e6)

    def leave(self) -> None:
        """Let the server have nothing to do."""
        if self._stream is not None:
            self._stream.close()
        eventually(lambda: self.metric("hasten_requests_running") + self.metric("hasten_requests_waiting") == 0)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    log = tmp_path_factory.mktemp("overload") / "log"
    with serve_process(log, str(DEMO), "--text-name", TEXT, "--max-num-seqs", "1") as indices:
        result = Busy(indices)
        yield result
        result.leave()
        result.openai.close()


@pytest.fixture
def occupied(busy: Busy) -> Busy:
    busy.occupy()
    return busy


def token_inputs(client: Any) -> list[Any]:
    result = []
    for name, values in (("input_ids", [[5, 6]]), ("input_lengths", [[2]]), ("request_output_len", [[2]])):
        tensor = client.InferInput(name, [1, len(values[0])], "UINT32")
        tensor.set_data_from_numpy(np.array(values, np.uint32))
        result.append(tensor)
    return result


def text_request() -> Any:
    request = service_pb2.ModelInferRequest(model_name=TEXT)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"Ben")
    request.parameters["timeout"].int64_param = MAY_WAIT_US
    return request


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_is_refused_at_once(occupied: Busy, stream: bool) -> None:
    before = occupied.metric("hasten_requests_refused_total", reason="queue_wait")
    with pytest.raises(openai.RateLimitError, match="the request would wait for about") as caught:
        occupied.openai.completions.create(model=TEXT, prompt="Ben", stream=stream, extra_headers=IMPATIENT)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (429, "queue_wait", "rate_limit_error")
    assert int(caught.value.response.headers["retry-after"]) > 1
    assert occupied.metric("hasten_requests_refused_total", reason="queue_wait") == before + 1


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_generate_is_refused_at_once(occupied: Busy, path: str) -> None:
    body = {"text_input": "Ben", "timeout": MAY_WAIT_US}
    answer = httpx.post(f"{occupied.http}/v2/models/{TEXT}/{path}", json=body)
    assert answer.status_code == 503
    assert "Request timeout expired: the request would wait for about" in answer.json()["error"]
    assert int(answer.headers["retry-after"]) > 1


def test_tritons_clients_are_refused_at_once(occupied: Busy) -> None:
    http, rpc = httpclient.InferenceServerClient(occupied.http[7:]), grpcclient.InferenceServerClient(occupied.grpc)
    calls: list[Callable[[], Any]] = [
        lambda: http.infer(TOKENS, token_inputs(httpclient), timeout=MAY_WAIT_US),
        lambda: rpc.infer(TOKENS, token_inputs(grpcclient), timeout=MAY_WAIT_US),
    ]
    with http, rpc:
        for call, status in zip(calls, ("503", "StatusCode.UNAVAILABLE"), strict=True):
            with pytest.raises(InferenceServerException, match="Request timeout expired") as caught:
                call()
            assert caught.value.status() == status


def test_a_stream_over_grpc_is_refused_at_once_and_stays_open(occupied: Busy) -> None:
    with grpc.insecure_channel(occupied.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = list(stub.ModelStreamInfer(iter([text_request()] * 2)))
    assert len(answers) == 2
    assert all("Request timeout expired" in answer.error_message for answer in answers)


def test_grpc_says_when_to_try_again(occupied: Busy) -> None:
    request = service_pb2.ModelInferRequest(model_name=TOKENS)
    for tensor in token_inputs(grpcclient):
        request.inputs.append(tensor._get_tensor())
        request.raw_input_contents.append(tensor._get_content())
    request.parameters["timeout"].int64_param = MAY_WAIT_US
    with grpc.insecure_channel(occupied.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, metadata=[("x-request-id", "q1")])
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    metadata = dict(error.trailing_metadata())
    assert metadata["grpc-retry-pushback-ms"] == f"{metadata['retry-after']}000"
    assert int(metadata["retry-after"]) > 1
    assert metadata["x-request-id"] == "q1"


def test_a_server_that_refuses_is_ready_and_serves_whoever_has_time(occupied: Busy) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert httpx.get(f"{occupied.http}{path}").status_code == 200
    occupied.leave()
    occupied.occupy()  # anew, with all that it has to do
    with ThreadPoolExecutor() as pool:
        patient = pool.submit(occupied.openai.completions.create, model=TEXT, prompt="Ben", max_tokens=2)
        eventually(lambda: occupied.metric("hasten_requests_waiting") == MANY or patient.done())
        occupied.leave()
        assert patient.result().choices[0].text
    headers = {"x-queue-timeout-ms": "100000"}
    answer = occupied.openai.completions.create(model=TEXT, prompt="Ben", max_tokens=2, extra_headers=headers)
    assert answer.choices[0].text


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "soon", "9" * 20, "\u0663"])
def test_a_limit_that_is_none_is_refused(busy: Busy, value: str) -> None:
    headers = {b"x-queue-timeout-ms": value.encode()}
    answer = httpx.post(f"{busy.http}/v1/completions", json={"model": TEXT, "prompt": "Ben"}, headers=headers)
    assert answer.status_code == 400
    assert "x-queue-timeout-ms must be a whole number of milliseconds" in answer.json()["error"]["message"]
