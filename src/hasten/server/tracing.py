"""OpenTelemetry: each call is a span, its requests of engines are spans below it, and their parts below those.

Names and attributes are those of OpenTelemetry's conventions for generative AI, and vLLM's of latencies besides.

Metrics are those of generative AI, of each request of an engine. Both are exported over OTLP.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from hasten import __version__
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra
from hasten.core.types import PoolingParams, SamplingParams

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import Span

    from hasten.server.engine.ticket import Ticket

_log = logging.getLogger(__name__)
_LAST_EXPORT_S = 3.0
_REQUEST = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "choice.count": "n",
    "stop_sequences": "stop",
}
"""Attributes gen_ai.request.*, and the sampling parameters that they show."""


class Tracing:
    """Exports the spans of a server's calls over OTLP."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: URL that takes OTLP over HTTP, such as http://localhost:4318/v1/traces.

        ConfigError where it is none, or the extra is not installed.
        """
        check_otlp("traces", endpoint)
        require_extra("otel", "--otlp-traces-endpoint")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=otlp_resource(), shutdown_on_exit=False)
        self._exporter = _Exporter(OTLPSpanExporter(endpoint=endpoint))
        self._provider.add_span_processor(BatchSpanProcessor(cast(Any, self._exporter)))
        self._endpoint = endpoint
        self.tracer = self._provider.get_tracer("hasten.server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._closed = False

    def call(self, name: str, headers: Mapping[str, str], request_id: str) -> "TracedCall":
        """The spans of a call; `headers`: those of W3C's trace context, in small letters."""
        return TracedCall(self.tracer, name, self._propagator.extract(headers), request_id)

    def close(self) -> None:
        """Export what is left, for some seconds: the collector may be gone. A second call does nothing."""
        if self._closed:
            return
        self._closed = self._exporter.ends = True
        if not _shut_down(self._provider):
            self._exporter.shutdown()
            _log.warning("the last traces were not taken within %g s by %s", _LAST_EXPORT_S, self._endpoint)


def _shut_down(provider: Any) -> bool:
    """Have a provider of OpenTelemetry's export what is left; whether that was done in time."""
    closing = threading.Thread(target=provider.shutdown, daemon=True)
    closing.start()
    closing.join(_LAST_EXPORT_S)
    return not closing.is_alive()


class _Exporter:
    """An exporter of OpenTelemetry's that goes on with what it does once it has been given up, but tells nothing of it:
    a process that ends has no use for its warnings, and the last of them comes seconds later.
    """

    def __init__(self, exporter: Any) -> None:
        self.ends = False
        """Whether what is exported now is the last."""
        self._exporter = exporter
        self._is_shut = False
        self._thread: int | None = None
        """The one that exports."""
        self._log = logging.getLogger(type(exporter).__module__)

    def export(self, spans: Any) -> Any:
        """Send spans, and send them again after failures, for some time."""
        self._thread = threading.get_ident()
        self._log.addFilter(self._is_wanted)
        try:
            return self._exporter.export(spans)
        finally:
            self._log.removeFilter(self._is_wanted)

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        return not self.ends or record.thread != self._thread

    def shutdown(self) -> None:
        """Begin no attempt any more."""
        if not self._is_shut:
            self._is_shut = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is held back here."""
        return True


def otlp_resource() -> "Resource":
    """What spans and metrics say of the server; OTEL_SERVICE_NAME names it otherwise."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "hasten"}
    return Resource.create({"service.version": __version__, **named})


def check_otlp(signal: str, endpoint: str) -> None:
    """ConfigError where an endpoint of traces or metrics is no URL, or another protocol is wanted than there is."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--otlp-{signal}-endpoint must be an http or https URL, got {endpoint!r:.200}; {signal} are exported over "
            f"HTTP: collectors mostly take them at http://HOST:4318/v1/{signal}"
        )
    variable = f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL"
    if (protocol := os.environ.get(variable, "http/protobuf")) != "http/protobuf":
        raise ConfigError(f"{variable} is {protocol!r:.80}; {signal} are exported over http/protobuf alone")


def operation_of(call: str, params: SamplingParams | PoolingParams | None) -> str:
    """What a request of a call with this name does, as the conventions call it."""
    if isinstance(params, PoolingParams):
        return "embeddings"
    chats = ("chat", "messages", "responses")
    return "chat" if any(name in call for name in chats) else "text_completion"


def _about(request: "Ticket", operation: str) -> dict[str, Any]:
    """What spans and metrics say of a request."""
    models = dict.fromkeys(("gen_ai.request.model", "gen_ai.response.model"), request.model)
    return {"gen_ai.operation.name": operation, "gen_ai.provider.name": "hasten", **models}


class TracedCall:
    """The span of a call, and those of its requests."""

    def __init__(self, tracer: Any, name: str, parent: "Context", request_id: str) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._tracer = tracer
        self._offset = time.time_ns() - time.monotonic_ns()
        """From the clock of requests to that of spans, in ns."""
        self._span: Span = tracer.start_span(name, parent, SpanKind.SERVER, {"hasten.request_id": request_id})
        self._context = set_span_in_context(self._span, parent)
        self._path = name

    @property
    def trace_id(self) -> str:
        """In 32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def end(self, name: str, status: str, *, failed: bool) -> None:
        """The call has ended: with which status, and whether that is the server's fault."""
        from opentelemetry.trace import StatusCode

        is_number = status.isdigit()
        self._span.set_attribute(
            "http.response.status_code" if is_number else "rpc.response.status_code",
            int(status) if is_number else status,
        )
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def add(self, request: "Ticket", ended: float, error: str | None) -> None:
        """Export what became of a request, which ended at this time, or by an error of this class."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        if not self._span.is_recording():
            return
        operation = operation_of(self._path, request.params)
        span = self._tracer.start_span(
            f"{operation} {request.model}".strip(),
            self._context,
            SpanKind.INTERNAL,
            _attributes(request, ended, operation),
            start_time=self._ns(request.arrived),
        )
        below = set_span_in_context(span, self._context)
        first = None if request.first is None else request.first.at
        ends = {"queue": request.begun, "prefill": first, "decode": ended}
        begin = request.arrived
        for name, end in ends.items():
            part = self._tracer.start_span(name, below, start_time=self._ns(begin))
            part.end(self._ns(ended if end is None else end))
            if end is None:
                break
            begin = end
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR)
        span.end(self._ns(ended))

    def _ns(self, seconds: float) -> int:
        return self._offset + round(1e9 * seconds)


def _attributes(request: "Ticket", ended: float, operation: str) -> dict[str, Any]:
    first = request.first
    attributes = _about(request, operation) | {
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.cache_read.input_tokens": 0 if first is None else first.cached_tokens,
        "gen_ai.usage.output_tokens": request.tokens,
        "gen_ai.latency.e2e": ended - request.arrived,
    }
    if request.reasons:
        attributes["gen_ai.response.finish_reasons"] = [reason.value for reason in request.reasons]
    if request.begun is not None:
        attributes["gen_ai.latency.time_in_queue"] = request.begun - request.arrived
        attributes["gen_ai.latency.time_in_model_inference"] = ended - request.begun
        if first is not None:
            attributes["gen_ai.latency.time_in_model_prefill"] = first.at - request.begun
            attributes["gen_ai.latency.time_in_model_decode"] = ended - first.at
    if first is not None:
        attributes["gen_ai.latency.time_to_first_token"] = first.at - request.arrived
    if isinstance(request.params, SamplingParams):
        requested = {name: getattr(request.params, field) for name, field in _REQUEST.items()}
        attributes |= {f"gen_ai.request.{name}": value for name, value in requested.items() if value not in (None, ())}
    return attributes


_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Bounds as the conventions advise them."""


class OtelMetrics:
    """Counts the requests of a server's calls, and exports the counts now and then."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: URL that takes OTLP over HTTP, such as http://localhost:4318/v1/metrics.

        ConfigError where it is none, or the extra is not installed.
        """
        check_otlp("metrics", endpoint)
        require_extra("otel", "--otlp-metrics-endpoint")
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint))
        self._provider = MeterProvider([reader], otlp_resource(), shutdown_on_exit=False)
        meter = self._provider.get_meter("hasten.server", __version__)

        def histogram(name: str, bounds: tuple[float, ...], description: str) -> Any:
            return meter.create_histogram(
                f"gen_ai.server.{name}", "s", description, explicit_bucket_boundaries_advisory=bounds
            )

        self._duration = histogram("request.duration", _DURATION_S, "Time from a request to its end")
        self._first_token = histogram("time_to_first_token", _FIRST_TOKEN_S, "Time from a request to its first token")
        self._each_token = histogram("time_per_output_token", _TOKEN_S, "Time per output token after the first one")
        self._closed = False

    def record(self, call: str, request: "Ticket", ended: float, error: str | None) -> None:
        """Count a request of a call with this name, which ended at this time, or by an error of this class."""
        attributes = _about(request, operation_of(call, request.params))
        failed = {} if error is None else {"error.type": error}
        self._duration.record(ended - request.arrived, attributes | failed)
        if failed or request.first is None:
            return
        self._first_token.record(request.first.at - request.arrived, attributes)
        completions = max(1, len(request.reasons))
        if (rest := request.tokens - completions) > 0:
            # several completions are made at the same time
            self._each_token.record((ended - request.first.at) / (rest / completions), attributes)

    def close(self) -> None:
        """Export what is left, for some seconds: the collector may be gone. A second call does nothing."""
        if not self._closed:
            self._closed = True
            _shut_down(self._provider)
