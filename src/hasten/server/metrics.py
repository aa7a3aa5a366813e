"""Metrics in Prometheus's text format: Triton's under Triton's names, what language models have besides, and vLLM's.

Counters are there, at 0, from the moment a model is loaded.
"""

import math
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import methodcaller
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten import __version__
from hasten.server.access import AccessLog
from hasten.server.engine.queue import QUEUE_REASONS
from hasten.server.exposition import CONTENT_TYPE, Family, Labels, Metric, families
from hasten.server.inflight import InflightBytes
from hasten.server.machine import CpuMeter, GpuMeter
from hasten.server.openai.models import models_by_id
from hasten.server.types import ServiceError
from hasten.server.vllm_metrics import cache_usage, vllm_families

if TYPE_CHECKING:
    from hasten.server.service import Service

Key = tuple[str, str]
"""Model and version."""

_MACHINE: Sequence[Metric] = tuple(
    Metric(name, kind, text, methodcaller("get", name))
    for name, kind, text in (
        ("nv_cpu_utilization", "gauge", "CPU utilization rate [0.0 - 1.0]"),
        ("nv_cpu_memory_total_bytes", "gauge", "CPU total memory (RAM), in bytes"),
        ("nv_cpu_memory_used_bytes", "gauge", "CPU used memory (RAM), in bytes"),
        ("nv_gpu_utilization", "gauge", "GPU utilization rate [0.0 - 1.0)"),
        ("nv_gpu_memory_total_bytes", "gauge", "GPU total memory, in bytes"),
        ("nv_gpu_memory_used_bytes", "gauge", "GPU used memory, in bytes"),
        ("nv_gpu_power_usage", "gauge", "GPU power usage in watts"),
        ("nv_gpu_power_limit", "gauge", "GPU power management limit in watts"),
        ("nv_energy_consumption", "counter", "GPU energy consumption in joules since the server started"),
    )
)
_TRITON: Sequence[Metric] = (
    Metric("request_failure", "counter", "Number of failed inference requests, all batch sizes",
           lambda model: {reason.value: count for reason, count in model.failures.items()}, "reason"),
    Metric("request_success", "counter", "Number of successful inference requests, all batch sizes",
           lambda model: model.durations.counts["success"]),
    Metric("count", "counter", "Number of inferences performed (does not include cached requests)", "inference_count"),
    Metric("exec_count", "counter", "Number of model executions performed (does not include cached requests)",
           "execution_count"),
    Metric("request_duration_us", "counter", "Cumulative inference request duration in microseconds",
           lambda model: model.durations.us("success")),
    Metric("queue_duration_us", "counter", "Cumulative inference queuing duration in microseconds",
           lambda model: model.durations.us("queue")),
    Metric("compute_input_duration_us", "counter", "Cumulative compute input duration in microseconds",
           lambda model: model.durations.us("compute_input")),
    Metric("compute_infer_duration_us", "counter", "Cumulative compute inference duration in microseconds",
           lambda model: model.durations.us("compute_infer")),
    Metric("compute_output_duration_us", "counter", "Cumulative inference compute output duration in microseconds",
           lambda model: model.durations.us("compute_output")),
    Metric("pending_request_count", "gauge", "Instantaneous number of pending requests awaiting execution per-model.",
           "pending"),
)  # fmt: skip
_LOAD = Metric("load_duration_secs", "gauge", "Model load time in seconds", "load_seconds")
_FIRST_RESPONSE = Metric("first_response_histogram_ms", "histogram", "Duration from request to first response in "
                         "milliseconds", "first_response_ms")  # fmt: skip
_LANGUAGE: Sequence[Metric] = (
    Metric("time_to_first_token_seconds", "histogram", "Time from a request to its first token, whether or not it "
           "streams", "time_to_first_token"),
    Metric("time_per_output_token_seconds", "histogram", "Time per token of a request, from its first token to its "
           "end", "time_per_output_token"),
    Metric("e2e_request_latency_seconds", "histogram", "Time from a request to its end", "latency"),
    Metric("queue_time_seconds", "histogram", "Time that a request waited before it was begun", "queue_time"),
    Metric("prompt_tokens_total", "counter", "Tokens of prompts", "prompt_tokens"),
    Metric("generation_tokens_total", "counter", "Tokens generated", "generation_tokens"),
    Metric("texts_total", "counter", "Texts of which a vector or scores were computed", "texts"),
    Metric("completions_total", "counter", "Completions by how they ended", "finished", "reason"),
)  # fmt: skip
_ENGINE: Sequence[Metric] = (
    Metric("engine_restarts_total", "counter", "Times that a dead engine was started again", "restarts"),
    Metric("requests_refused_total", "counter", "Requests that were not begun, by the reason",
           lambda engine: {reason: engine.refused[reason] for reason in QUEUE_REASONS}, "reason"),
    Metric("token_delivery_seconds", "histogram", "Time that tokens took from the engine's process to the server's "
           "(stage socket) and to all streams (write)", lambda engine: vars(engine.delivery), "stage"),
    Metric("estimated_wait_seconds", "gauge", "Estimated time until a request of default priority that came now would "
           "be begun", lambda engine: engine.estimated_wait()),
)  # fmt: skip
_STATS: Sequence[Metric] = (
    Metric("requests_running", "gauge", "Requests that have begun and are not finished", "running"),
    Metric("requests_waiting", "gauge", "Requests in the queue", "waiting"),
    Metric("kv_cache_usage_ratio", "gauge", "Share of the key/value cache's blocks in use [0.0 - 1.0]", cache_usage),
    Metric("prefix_cache_hit_tokens_total", "counter", "Tokens of prompts that were found in the prefix cache",
           "prefix_hit_tokens"),
    Metric("prefix_cache_query_tokens_total", "counter", "Tokens of prompts that were looked up in the prefix cache",
           "prefix_query_tokens"),
    Metric("preemptions_total", "counter", "Times that a request had to give its cache blocks back", "preemptions"),
    Metric("engine_steps_total", "counter", "Steps of the engine", "steps"),
    Metric("engine_mixed_steps_total", "counter", "Steps that computed prompts while other requests decoded",
           "mixed_steps"),
    Metric("engine_limited_steps_total", "counter", "Mixed steps whose prompts were cut to keep to --itl-target",
           "limited_steps"),
    Metric("engine_mixed_step_seconds_total", "counter", "Time of mixed steps, measured", "mixed_seconds"),
    Metric("engine_mixed_step_predicted_seconds_total", "counter", "Time of mixed steps, as predicted",
           "predicted_mixed_seconds"),
)  # fmt: skip
_REPLICA: Sequence[Metric] = (
    Metric("ready", "gauge", "Whether the engine computes requests: 1, or 0 while it starts again or stands still",
           "ready"),
    Metric("restarts_total", "counter", "Times that the engine was started again after it had died", "restarts"),
)  # fmt: skip
_REPLICA_STATS: Sequence[Metric] = (
    *_STATS[:4],
    Metric("prompt_tokens_total", "counter", "Tokens of the prompts that the engine has taken", "prompt_tokens"),
    Metric("generation_tokens_total", "counter", "Tokens that the engine has generated", "generation_tokens"),
)  # fmt: skip
"""Of each engine of a model; what the models' own metrics have is the sum."""
_SERVER: Sequence[Metric] = (
    Metric("build_info", "gauge", "Always 1; the version is a label", lambda _: {__version__: 1}, "version"),
    Metric("inflight_request_bytes", "gauge", "Bytes of requests in flight, of each beyond 64 KiB", "inflight.held"),
    Metric("inflight_refusals_total", "counter", "Requests refused for --max-inflight-bytes", "inflight.refusals"),
)  # fmt: skip
_CALLS = Metric("api_calls_total", "counter", "Calls by API and by the status of their answer", lambda count: count)


class Machine:
    """What is exposed of the machine, measured anew once the last measurement is older than `interval` seconds."""

    def __init__(self, *, cpu: bool = True, gpus: bool = True, interval: float = 0.0) -> None:
        self._cpu = CpuMeter() if cpu else None
        self._gpus = GpuMeter() if gpus else None
        self._interval = interval
        self._read_at = -math.inf
        self._families: list[Family] = []

    def sources(self) -> list[str]:
        """What is measured, in words: of each GPU, and of the processors."""
        names = [] if self._gpus is None else self._gpus.names()
        found = [f"metrics for GPU {number}: {name}" for number, name in enumerate(names)]
        return found if self._cpu is None else [*found, "CPU metrics"]

    def families(self) -> list[Family]:
        """As they were at the last measurement."""
        if time.monotonic() - self._read_at >= self._interval:
            self._read_at = time.monotonic()
            read: list[tuple[Labels, Mapping[str, float]]] = []
            if self._cpu is not None:
                read.append(({}, self._cpu.read()))
            if self._gpus is not None:
                read += [({"gpu_uuid": uuid}, values) for uuid, values in self._gpus.read().items()]
            self._families = [family for family in families("", _MACHINE, read) if family.samples]
        return self._families


class Metrics:
    """What is exposed of a service and of the machine that it runs on."""

    def __init__(
        self,
        service: "Service",
        machine: Machine | None = None,
        access: AccessLog | None = None,
        inflight: InflightBytes | None = None,
    ) -> None:
        self._service = service
        self._machine = machine or Machine()
        self._access = access or AccessLog()
        self.inflight: InflightBytes = inflight or InflightBytes()

    def text(self) -> str:
        """All metrics as they are now."""
        models = [(_model(key), counters) for key, counters in sorted(self._service.counters.items())]
        language = [(labels, each.language.total) for labels, each in models if each.language is not None]
        engines = self._service.engines()
        clients = [(_model(key), engine) for key, engine in engines.items()]
        # each engine by the first of the names that clients of OpenAI's API know it by
        names = {key: name for name, key in reversed(models_by_id(engines, self._service.text_models()).items())}
        replicas = [
            ({**labels, "replica": str(index)}, replica)
            for labels, engine in clients
            for index, replica in enumerate(engine.replicas)
        ]
        responding = [pair for pair in models if pair[1].first_response_ms.count or self._is_decoupled(pair[0])]
        calls = sorted(self._access.counts.items())
        found = chain(
            families("nv_inference_", _TRITON, models),
            families("nv_model_", (_LOAD,), models),
            families("nv_inference_", (_FIRST_RESPONSE,), responding),
            families("hasten_", _LANGUAGE, language),
            families("hasten_", _ENGINE, clients),
            families("hasten_", _STATS, [(labels, engine.stats()) for labels, engine in clients]),
            families("hasten_replica_", _REPLICA, replicas),
            families("hasten_replica_", _REPLICA_STATS, [(labels, replica.stats()) for labels, replica in replicas]),
            vllm_families({name: engines[key] for key, name in names.items()}),
            families("hasten_", _SERVER, [({}, self)]),
            families("hasten_", (_CALLS,), [({"api": api, "status": status}, count) for (api, status), count in calls]),
            self._machine.families(),
        )
        return "".join(family.text() for family in found)

    def routes(self) -> list[Route]:
        """The route /metrics."""

        async def metrics(_: Request) -> Response:
            """Metrics for Prometheus"""
            return Response(self.text(), headers={"content-type": CONTENT_TYPE})

        return [Route("/metrics", metrics)]

    def _is_decoupled(self, labels: Labels) -> bool:
        try:
            return self._service.is_decoupled(labels["model"], labels["version"])
        except ServiceError:  # not loaded now
            return False


def _model(key: Key) -> Labels:
    return {"model": key[0], "version": key[1]}
