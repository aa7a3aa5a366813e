"""Traces and log lines of calls, over every transport: a real exporter, and a collector in this process."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as grpcclient
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.server.running import running
from tests.server.test_app import FREE
from tests.waiting import LIMIT_S, attempts, eventually
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.core.types import FinishReason, PoolingParams, SamplingParams
from hasten.server.app import Server
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import FirstToken
from hasten.server.options import LogOptions, ModelOptions, ServeOptions
from hasten.server.tracing import OtelMetrics, Tracing

pytestmark = pytest.mark.any_python

DEMO = Path(__file__).parents[2] / "examples/demo-model"
PROMPT = "Anna opened the door"


@dataclass
class Span:
    """What a collector gets of a span."""

    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    attributes: dict[str, Any]
    failed: bool
    kind: int
    service: str


@dataclass
class Point:
    """The newest values of a histogram with some attributes."""

    count: int
    sum: float
    bounds: list[float]


class Collector:
    """Takes spans and metrics over OTLP/HTTP, as a collector does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.points: dict[tuple[str, str, str, str], Point] = {}
        """By the metric's name, its operation, model and error."""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/metrics":
                    collector.take_metrics(ExportMetricsServiceRequest.FromString(body))
                else:
                    assert self.path == "/v1/traces"
                    collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for of_resource in request.resource_spans:
            resource = {each.key: each.value.string_value for each in of_resource.resource.attributes}
            for scope in of_resource.scope_spans:
                self.spans += [
                    Span(
                        name=span.name,
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        begin=span.start_time_unix_nano,
                        end=span.end_time_unix_nano,
                        attributes={each.key: value_of(each.value) for each in span.attributes},
                        failed=span.status.code == 2,
                        kind=span.kind,
                        service=resource["service.name"],
                    )
                    for span in scope.spans
                ]

    def take_metrics(self, request: ExportMetricsServiceRequest) -> None:
        for of_resource in request.resource_metrics:
            resource = {each.key: each.value.string_value for each in of_resource.resource.attributes}
            assert resource["service.name"] == "hasten"
            for metric in (metric for scope in of_resource.scope_metrics for metric in scope.metrics):
                for point in metric.histogram.data_points:
                    about = {each.key: each.value.string_value for each in point.attributes}
                    assert about["gen_ai.provider.name"] == "hasten"
                    names = ("gen_ai.operation.name", "gen_ai.request.model", "error.type")
                    operation, model, error = (about.get(name, "") for name in names)
                    result = Point(point.count, point.sum, list(point.explicit_bounds))
                    self.points[metric.name, operation, model, error] = result

    def of(self, trace: str) -> dict[str, Span]:
        """The spans of a trace by their names, once its call has ended."""
        eventually(lambda: any(span.trace == trace and span.kind == 2 for span in self.spans))
        return {span.name: span for span in self.spans if span.trace == trace}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(collector: Collector) -> Iterator[Server]:
    options = ServeOptions(
        engine=EngineConfig.create(str(DEMO)),
        endpoints=FREE,
        model=ModelOptions(text_name="story", decoupled=True),
        log=LogOptions(
            otlp_traces_endpoint=collector.url,
            otlp_metrics_endpoint=collector.url.replace("traces", "metrics"),
            log_requests=True,
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
        with running(options) as server:
            yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    assert server.http is not None
    with httpx.Client(base_url=f"http://{server.http.address}", timeout=LIMIT_S) as client:
        yield client


def parent(number: int, *, sampled: bool = True) -> tuple[str, str, str]:
    """A trace's id, the id of the span that a client sends, and both as a header."""
    trace, span = f"{number:032x}", f"{number:016x}"
    return trace, span, f"00-{trace}-{span}-0{int(sampled)}"


def check(spans: dict[str, Span], root: Span, request: Span, *, prompt: int, output: int) -> None:
    """Whether a call's spans are one below the other, in the order of time."""
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert request.parent == root.id
    assert {part.parent for part in parts} == {request.id}
    times = [request.begin, parts[0].end, parts[1].end, parts[2].end]
    assert times == sorted(times)
    assert [part.begin for part in parts] == times[:3]
    assert parts[2].end == request.end
    assert root.begin <= request.begin <= request.end <= root.end + 1_000_000  # two clocks
    assert abs(root.end - time.time_ns()) < 600e9
    found = request.attributes
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (prompt, output)
    seconds = (request.end - request.begin) / 1e9
    assert found["gen_ai.latency.e2e"] == pytest.approx(seconds, abs=1e-5)
    summed = sum(found[f"gen_ai.latency.time_in_{part}"] for part in ("queue", "model_prefill", "model_decode"))
    assert summed == pytest.approx(seconds, abs=1e-5)
    assert found["gen_ai.provider.name"] == "hasten"
    assert root.service == "hasten"


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_traced_below_the_clients_span(
    http: httpx.Client, collector: Collector, *, stream: bool
) -> None:
    trace, span, header = parent(17 + stream)
    requested = {
        "model": "story",
        "prompt": PROMPT,
        "max_tokens": 6,
        "ignore_eos": True,
        "stream": stream,
        "top_p": 0.9,
    }
    answer = http.post("/v1/completions", json=requested, headers={"traceparent": header, "x-request-id": "me"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "me"
    spans = collector.of(trace)
    assert set(spans) == {"POST /v1/completions", "text_completion story", "queue", "prefill", "decode"}
    root, request = spans["POST /v1/completions"], spans["text_completion story"]
    assert root.parent == span
    assert root.attributes == {"hasten.request_id": "me", "http.response.status_code": 200}
    check(spans, root, request, prompt=7, output=6)
    found = request.attributes
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "story"
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.top_p"]) == (6, 0.9)
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["gen_ai.operation.name"] == "text_completion"


def test_prompts_of_a_call_are_in_one_trace_without_a_clients_span_too(
    http: httpx.Client, collector: Collector
) -> None:
    before = {span.trace for span in collector.spans}
    requested = {"model": "story", "prompt": [PROMPT, PROMPT, "Ben"], "max_tokens": 2}
    assert http.post("/v1/completions", json=requested).status_code == 200
    eventually(lambda: any(span.kind == 2 and span.trace not in before for span in collector.spans))
    (root,) = [span for span in collector.spans if span.kind == 2 and span.trace not in before]
    assert root.parent == ""
    requests = [span for span in collector.spans if span.parent == root.id]
    assert [span.name for span in requests] == ["text_completion story"] * 3


def test_what_the_client_does_not_sample_is_not_exported(http: httpx.Client, collector: Collector) -> None:
    unsampled, _, header = parent(31, sampled=False)
    trace, _, later = parent(32)
    for given in (header, later):
        http.post("/v1/completions", json={"model": "story", "prompt": "a"}, headers={"traceparent": given})
    collector.of(trace)
    assert not [span for span in collector.spans if span.trace == unsampled]


def test_probes_and_metrics_are_not_traced(http: httpx.Client, collector: Collector) -> None:
    probed, _, header = parent(41)
    for path in ("/health", "/v2/health/ready", "/metrics", "/"):
        assert http.get(path, headers={"traceparent": header}).status_code == 200
    trace, _, later = parent(42)
    assert http.get("/v1/models", headers={"traceparent": later}).status_code == 200
    assert list(collector.of(trace)) == ["GET /v1/models"]
    assert not [span for span in collector.spans if span.trace == probed]


def test_a_refused_request_has_its_status(http: httpx.Client, collector: Collector) -> None:
    trace, _, header = parent(51)
    answer = http.post("/v1/completions", json={"model": "none", "prompt": "a"}, headers={"traceparent": header})
    assert answer.status_code == 404
    assert len(answer.headers["x-request-id"]) == 16
    (span,) = collector.of(trace).values()
    assert span.attributes["http.response.status_code"] == 404
    assert not span.failed  # the client's fault is no error of the server


def test_a_client_that_leaves_ends_its_spans(server: Server, http: httpx.Client, collector: Collector) -> None:
    requested = {"model": "story", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    for number in attempts("a client that leaves before the end"):
        trace, _, header = parent(6100 + number)
        with http.stream("POST", "/v1/completions", json=requested, headers={"traceparent": header}) as answer:
            next(answer.iter_lines())
        spans = collector.of(trace)
        assert spans["POST /v1/completions"].attributes["http.response.status_code"] in (200, 499)
        if spans["text_completion story"].attributes["gen_ai.response.finish_reasons"] == ["abort"]:
            break


def test_calls_of_tritons_protocol_are_traced(server: Server, http: httpx.Client, collector: Collector) -> None:
    trace, span, header = parent(71)
    requested = {"text_input": PROMPT, "max_tokens": 1}
    answer = http.post("/v2/models/story/generate_stream", json=requested, headers={"traceparent": header})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"]
    spans = collector.of(trace)
    root, request = spans["POST /v2/models/story/generate_stream"], spans["text_completion story"]
    assert root.parent == span
    check(spans, root, request, prompt=7, output=1)


def token_inputs() -> list[grpcclient.InferInput]:
    produced = []
    for name, data in {"input_ids": [[9, 10, 304]], "input_lengths": [[3]], "request_output_len": [[4]]}.items():
        array = np.array(data, np.uint32)
        produced.append(grpcclient.InferInput(name, array.shape, "UINT32"))
        produced[-1].set_data_from_numpy(array)
    return produced


def test_calls_over_grpc_are_traced_from_their_metadata(server: Server, collector: Collector) -> None:
    assert server.grpc is not None
    trace, span, header = parent(81)
    answers: list[Any] = []
    with grpcclient.InferenceServerClient(server.grpc.address) as client:
        client.start_stream(lambda result, error: answers.append((result, error)), headers={"traceparent": header})
        client.async_stream_infer("fastertransformer", token_inputs())
        eventually(lambda: bool(answers))
        client.stop_stream()
    assert [error for _, error in answers if error is not None] == []
    spans = collector.of(trace)
    root, request = spans["ModelStreamInfer"], spans["text_completion fastertransformer"]
    assert (root.parent, root.attributes["rpc.response.status_code"]) == (span, "OK")
    check(spans, root, request, prompt=3, output=4)
    with grpc.insecure_channel(server.grpc.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        trace, span, header = parent(82)
        with suppress(grpc.RpcError):
            stub.ModelInfer(pb.ModelInferRequest(model_name="none"), metadata=(("traceparent", header),))
    (root,) = collector.of(trace).values()
    assert (root.parent, root.attributes["rpc.response.status_code"]) == (span, "NOT_FOUND")
    assert not root.failed


NAMES = ("request.duration", "time_to_first_token", "time_per_output_token")


def test_requests_are_counted_in_the_conventions_metrics(http: httpx.Client, collector: Collector) -> None:
    requested = {"model": "story", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
    assert http.post("/v1/completions", json=requested).status_code == 200
    keys = [(f"gen_ai.server.{name}", "text_completion", "story", "") for name in NAMES]
    eventually(lambda: all(key in collector.points for key in keys))
    duration, first = collector.points[keys[0]], collector.points[keys[1]]
    assert (duration.bounds[0], duration.bounds[-1], first.bounds[0]) == (0.01, 81.92, 0.001)


def test_what_is_counted_of_a_request(collector: Collector) -> None:
    metrics = OtelMetrics(collector.url.replace("traces", "metrics"))
    stop = [FinishReason.STOP]
    whole = Ticket(1, (1,) * 7, 1, bytearray(), model="counted", params=SamplingParams(), arrived=1.0, begun=1.5)
    whole.first, whole.tokens, whole.reasons = FirstToken(2.0, 0), 4, stop
    metrics.record("POST /v1/chat/completions", whole, 5.0, None)
    metrics.record("POST /v1/messages", replace(whole, tokens=8, reasons=stop * 2), 5.0, None)
    metrics.record("POST /v1/responses", replace(whole, tokens=1), 5.0, None)
    failed = replace(whole, first=None, begun=None, tokens=0, reasons=[])
    metrics.record("POST /v1/chat/completions", failed, 5.0, "QueueFullError")
    metrics.record("POST /v1/embeddings", replace(whole, params=PoolingParams(), first=None, reasons=[]), 5.0, None)
    metrics.close()
    counted = {
        key[0].removeprefix("gen_ai.server."): point for key, point in collector.points.items() if key[1:] == CHATS
    }
    assert {name: (point.count, point.sum) for name, point in counted.items()} == {
        "request.duration": (3, 12.0),
        "time_to_first_token": (3, 3.0),
        "time_per_output_token": (2, 2.0),
    }
    assert collector.points["gen_ai.server.request.duration", "chat", "counted", "QueueFullError"].count == 1
    assert collector.points["gen_ai.server.request.duration", "embeddings", "counted", ""].count == 1


CHATS = ("chat", "counted", "")


def test_a_request_is_one_line_of_the_log(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    trace, _, header = parent(91)
    with caplog.at_level(logging.INFO, "hasten.server.access"):
        with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", timeout=LIMIT_S) as client:
            given = {"x-request-id": "line-1", "traceparent": header}
            created = client.completions.create(
                model="story", prompt=[PROMPT, "Ben"], max_tokens=3, extra_headers=given
            )
        http.get("/health")
        eventually(lambda: bool(caplog.records))
    (record,) = caplog.records
    fields = cast(Any, record).fields
    assert fields["request_id"] == "line-1"
    assert fields["trace_id"] == trace
    assert (fields["call"], fields["status"]) == ("HTTP POST /v1/completions", "200")
    assert created.usage is not None
    assert (fields["model"], fields["prompt_tokens"]) == ("story", created.usage.prompt_tokens)
    assert fields["completion_tokens"] == created.usage.completion_tokens
    assert set(fields["finish_reason"].split(",")) <= {"stop", "length"}
    assert 0 <= fields["queue_ms"] <= fields["first_token_ms"] <= fields["duration_ms"]
    assert record.getMessage().startswith("HTTP POST /v1/completions 200 in ")
    assert "request id line-1, model story, prompt_tokens" in record.getMessage()
    json.dumps(fields)


@pytest.mark.parametrize("endpoint", ["grpc://localhost:4317", "localhost:4318", "http://", "/v1/traces"])
def test_an_endpoint_that_is_no_url_is_an_error(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint must be an http or https URL"):
        Tracing(endpoint)
    with pytest.raises(ConfigError, match="--otlp-metrics-endpoint must be an http or https URL"):
        OtelMetrics(endpoint)


def test_another_protocol_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="over http/protobuf alone"):
        Tracing("http://localhost:4318/v1/traces")


def exporting() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("OtelBatch")}


@pytest.mark.parametrize("gone", [False, True], ids=["silent", "gone"])
def test_a_collector_that_does_not_answer_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, gone: bool
) -> None:
    """It ends in time and with one line; what is still on its way then ends later, without another one."""
    monkeypatch.setattr("hasten.server.tracing._LAST_EXPORT_S", 0.1)
    before = exporting()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        if gone:
            silent.close()
        tracing = Tracing(url)
        tracing.call("GET /v2", {}, "1").end("GET /v2", "200", failed=False)
        tracing.close()
        assert gone or exporting() - before  # which else would be waited for
        tracing.close()
    eventually(lambda: not exporting() - before)
    assert caplog.messages == [f"the last traces were not taken within 0.1 s by {url}"]


def test_a_server_without_traces_does_not_import_opentelemetry() -> None:
    code = "import sys, hasten.server.app; assert not [name for name in sys.modules if 'opentelemetry' in name]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
