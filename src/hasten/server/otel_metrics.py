"""OpenTelemetry's metrics of generative AI, of each request of an engine, exported over OTLP."""

import threading
from typing import Any

from hasten import __version__
from hasten.core.extras import require_extra
from hasten.server.call import EndedRequest
from hasten.server.tracing import check_otlp, operation_of, otlp_resource

_LAST_EXPORT_S = 3.0
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
        self._closing: threading.Thread | None = None

    def record(self, call: str, request: EndedRequest) -> None:
        """Count a request of a call with this name."""
        attributes = {
            "gen_ai.operation.name": operation_of(call, request.params),
            "gen_ai.provider.name": "hasten",
            "gen_ai.request.model": request.model,
            "gen_ai.response.model": request.model,
        }
        if request.error is not None:
            self._duration.record(request.ended - request.arrived, {**attributes, "error.type": request.error})
            return
        self._duration.record(request.ended - request.arrived, attributes)
        if request.first_token is None:
            return
        self._first_token.record(request.first_token - request.arrived, attributes)
        rest = request.output_tokens - max(1, len(request.reasons))
        if rest > 0:
            # several completions are made at the same time
            each = rest / max(1, len(request.reasons))
            self._each_token.record((request.ended - request.first_token) / each, attributes)

    def close(self) -> None:
        """Export what is left, for some seconds: the collector may be gone. A second call does nothing."""
        if self._closing is None:
            self._closing = threading.Thread(target=self._provider.shutdown, daemon=True)
            self._closing.start()
            self._closing.join(_LAST_EXPORT_S)
