"""Metrics in Prometheus's text format: Triton's under Triton's names, what language models have besides, and vLLM's.

Counters are there, at 0, from the moment a model is loaded.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten import __version__
from hasten.server.access import AccessLog
from hasten.server.engine.queue import QUEUE_REASONS
from hasten.server.exposition import CONTENT_TYPE, Family, Labels
from hasten.server.inflight import InflightBytes
from hasten.server.machine import CpuMeter, GpuMeter
from hasten.server.openai.models import models_by_id
from hasten.server.statistics import ModelCounters
from hasten.server.types import ServiceError
from hasten.server.vllm_metrics import vllm_families

if TYPE_CHECKING:
    from hasten.engine.stats import EngineStats
    from hasten.server.engine.replica import Replica
    from hasten.server.service import Service

Key = tuple[str, str]
"""Model and version."""

_PER_GPU = {
    "utilization": ("nv_gpu_utilization", "gauge", "GPU utilization rate [0.0 - 1.0)"),
    "memory_total": ("nv_gpu_memory_total_bytes", "gauge", "GPU total memory, in bytes"),
    "memory_used": ("nv_gpu_memory_used_bytes", "gauge", "GPU used memory, in bytes"),
    "power_usage": ("nv_gpu_power_usage", "gauge", "GPU power usage in watts"),
    "power_limit": ("nv_gpu_power_limit", "gauge", "GPU power management limit in watts"),
    "energy": ("nv_energy_consumption", "counter", "GPU energy consumption in joules since the server started"),
}


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
            self._families = [*_processors(self._cpu), *_gpus(self._gpus)]
        return self._families


def _processors(meter: CpuMeter | None) -> Iterable[Family]:
    if meter is None:
        return
    cpu = meter.read()
    for name, text, value in (
        ("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", cpu.utilization),
        ("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", cpu.memory_total),
        ("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", cpu.memory_used),
    ):
        family = Family(name, "gauge", text)
        family.add({}, value)
        yield family


def _gpus(meter: GpuMeter | None) -> Iterable[Family]:
    gpus = {} if meter is None else meter.read()
    for key, (name, kind, text) in _PER_GPU.items():
        family = Family(name, kind, text)
        for uuid, values in gpus.items():
            if key in values:
                family.add({"gpu_uuid": uuid}, values[key])
        yield family


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
        self._inflight = inflight or InflightBytes()

    def text(self) -> str:
        """All metrics as they are now."""
        models, engines = self._service.counters.all(), self._service.engines()
        families = [
            *_triton(models),
            self._first_response(models),
            *_language(models),
            *self._engines(),
            *self._replicas(),
            *vllm_families({name: engines[key] for name, key in self._names().items()}),
            *self._server(),
            *self._machine.families(),
        ]
        return "".join(family.text() for family in families)

    def routes(self) -> list[Route]:
        """The route /metrics."""

        async def metrics(_: Request) -> Response:
            """Metrics for Prometheus"""
            return Response(self.text(), headers={"content-type": CONTENT_TYPE})

        return [Route("/metrics", metrics)]

    def _names(self) -> dict[str, Key]:
        """The engines, each by the first of the names that clients of OpenAI's API know it by."""
        names = {key: name for name, key in reversed(models_by_id(self._service).items())}
        return {name: key for key, name in names.items()}

    def _first_response(self, models: Mapping[Key, ModelCounters]) -> Family:
        family = Family(
            "nv_inference_first_response_histogram_ms",
            "histogram",
            "Duration from request to first response in milliseconds",
        )
        for key, counters in models.items():
            if counters.first_response_ms.count or self._is_decoupled(key):
                family.add_histogram(_model(key), counters.first_response_ms)
        return family

    def _is_decoupled(self, key: Key) -> bool:
        try:
            return self._service.is_decoupled(*key)
        except ServiceError:  # not loaded now
            return False

    def _server(self) -> Iterable[Family]:
        build = Family("hasten_build_info", "gauge", "Always 1; the version is a label")
        build.add({"version": __version__}, 1)
        calls = Family("hasten_api_calls_total", "counter", "Calls by API and by the status of their answer")
        for (api, status), count in sorted(self._access.counts.items()):
            calls.add({"api": api, "status": status}, count)
        held = Family("hasten_inflight_request_bytes", "gauge", "Bytes of requests in flight, of each beyond 64 KiB")
        held.add({}, self._inflight.held)
        refusals = Family("hasten_inflight_refusals_total", "counter", "Requests refused for --max-inflight-bytes")
        refusals.add({}, self._inflight.refusals)
        return build, calls, held, refusals

    def _engines(self) -> Iterable[Family]:
        engines = self._service.engines()
        restarts = {key: float(engine.restarts) for key, engine in engines.items()}
        yield _family("hasten_engine_restarts_total", "counter", "Times that a dead engine was started again", restarts)
        refused = Family("hasten_requests_refused_total", "counter", "Requests that were not begun, by the reason")
        for key, engine in engines.items():
            for reason in QUEUE_REASONS:
                refused.add({**_model(key), "reason": reason}, engine.refused[reason])
        yield refused
        delivery = Family(
            "hasten_token_delivery_seconds",
            "histogram",
            "Time that tokens took from the engine's process to the server's (stage socket) and to all streams (write)",
        )
        for key, engine in engines.items():
            for stage, histogram in engine.delivery.stages().items():
                delivery.add_histogram({**_model(key), "stage": stage}, histogram)
        yield delivery
        waits = {key: engine.estimated_wait() for key, engine in engines.items()}
        yield _family(
            "hasten_estimated_wait_seconds",
            "gauge",
            "Estimated time until a request of default priority that came now would be begun",
            {key: wait for key, wait in waits.items() if wait is not None},
        )
        stats = {key: engine.stats() for key, engine in engines.items()}
        rows: Sequence[tuple[str, str, str, dict[Key, float]]] = (
            ("requests_running", "gauge", "Requests that have begun and are not finished",
             {key: counted.running for key, counted in stats.items()}),
            ("requests_waiting", "gauge", "Requests in the queue",
             {key: counted.waiting for key, counted in stats.items()}),
            ("kv_cache_usage_ratio", "gauge", "Share of the key/value cache's blocks in use [0.0 - 1.0]",
             {key: counted.used_blocks / max(1, counted.num_blocks) for key, counted in stats.items()}),
            ("prefix_cache_hit_tokens_total", "counter", "Tokens of prompts that were found in the prefix cache",
             {key: counted.prefix_hit_tokens for key, counted in stats.items()}),
            ("prefix_cache_query_tokens_total", "counter", "Tokens of prompts that were looked up in the prefix cache",
             {key: counted.prefix_query_tokens for key, counted in stats.items()}),
            ("preemptions_total", "counter", "Times that a request had to give its cache blocks back",
             {key: counted.preemptions for key, counted in stats.items()}),
            ("engine_steps_total", "counter", "Steps of the engine",
             {key: counted.steps for key, counted in stats.items()}),
            ("engine_mixed_steps_total", "counter", "Steps that computed prompts while other requests decoded",
             {key: counted.mixed_steps for key, counted in stats.items()}),
            ("engine_limited_steps_total", "counter", "Mixed steps whose prompts were cut to keep to --itl-target",
             {key: counted.limited_steps for key, counted in stats.items()}),
            ("engine_mixed_step_seconds_total", "counter", "Time of mixed steps, measured",
             {key: counted.mixed_seconds for key, counted in stats.items()}),
            ("engine_mixed_step_predicted_seconds_total", "counter", "Time of mixed steps, as predicted",
             {key: counted.predicted_mixed_seconds for key, counted in stats.items()}),
        )  # fmt: skip
        for name, kind, text, values in rows:
            yield _family(f"hasten_{name}", kind, text, values)

    def _replicas(self) -> Iterable[Family]:
        """What is exposed of each engine of a model; what the models' own families have is the sum."""
        rows: Sequence[tuple[str, str, str, Callable[[Replica, EngineStats], float]]] = (
            ("ready", "gauge", "Whether the engine computes requests: 1, or 0 while it starts again or stands still",
             lambda replica, _: replica.ready),
            ("restarts_total", "counter", "Times that the engine was started again after it had died",
             lambda replica, _: replica.restarts),
            ("requests_running", "gauge", "Requests that the engine has begun and not finished",
             lambda _, stats: stats.running),
            ("requests_waiting", "gauge", "Requests that the engine has and has not begun",
             lambda _, stats: stats.waiting),
            ("kv_cache_usage_ratio", "gauge", "Share of the blocks of the engine's key/value cache in use [0.0 - 1.0]",
             lambda _, stats: stats.used_blocks / max(1, stats.num_blocks)),
            ("prefix_cache_hit_tokens_total", "counter", "Tokens of prompts that the engine found in its prefix cache",
             lambda _, stats: stats.prefix_hit_tokens),
            ("prompt_tokens_total", "counter", "Tokens of the prompts that the engine has taken",
             lambda _, stats: stats.prompt_tokens),
            ("generation_tokens_total", "counter", "Tokens that the engine has generated",
             lambda _, stats: stats.generation_tokens),
        )  # fmt: skip
        replicas = [
            ({**_model(key), "replica": str(index)}, replica, replica.stats())
            for key, engine in self._service.engines().items()
            for index, replica in enumerate(engine.replicas)
        ]
        for name, kind, text, value in rows:
            family = Family(f"hasten_replica_{name}", kind, text)
            for labels, replica, stats in replicas:
                family.add(labels, value(replica, stats))
            yield family


def _model(key: Key) -> Labels:
    return {"model": key[0], "version": key[1]}


def _family(name: str, kind: str, text: str, values: Mapping[Key, float]) -> Family:
    family = Family(name, kind, text)
    for key, value in values.items():
        family.add(_model(key), value)
    return family


def _triton(models: Mapping[Key, ModelCounters]) -> Iterable[Family]:
    failures = Family("nv_inference_request_failure", "counter", "Number of failed inference requests, all batch sizes")
    for key, counters in models.items():
        for reason, count in counters.failures.items():
            failures.add({**_model(key), "reason": reason.value}, count)
    rows: Sequence[tuple[str, str, str, dict[Key, float]]] = (
        ("request_success", "counter", "Number of successful inference requests, all batch sizes",
         {key: counted.success.count for key, counted in models.items()}),
        ("count", "counter", "Number of inferences performed (does not include cached requests)",
         {key: counted.inference_count for key, counted in models.items()}),
        ("exec_count", "counter", "Number of model executions performed (does not include cached requests)",
         {key: counted.execution_count for key, counted in models.items()}),
        ("request_duration_us", "counter", "Cumulative inference request duration in microseconds",
         {key: counted.success.ns // 1000 for key, counted in models.items()}),
        ("queue_duration_us", "counter", "Cumulative inference queuing duration in microseconds",
         {key: counted.queue.ns // 1000 for key, counted in models.items()}),
        ("compute_input_duration_us", "counter", "Cumulative compute input duration in microseconds",
         {key: counted.compute.input.ns // 1000 for key, counted in models.items()}),
        ("compute_infer_duration_us", "counter", "Cumulative compute inference duration in microseconds",
         {key: counted.compute.infer.ns // 1000 for key, counted in models.items()}),
        ("compute_output_duration_us", "counter", "Cumulative inference compute output duration in microseconds",
         {key: counted.compute.output.ns // 1000 for key, counted in models.items()}),
        ("pending_request_count", "gauge", "Instantaneous number of pending requests awaiting execution per-model.",
         {key: counted.pending for key, counted in models.items()}),
    )  # fmt: skip
    load = {key: counted.load_seconds for key, counted in models.items()}
    return [
        failures,
        *(_family(f"nv_inference_{name}", kind, text, values) for name, kind, text, values in rows),
        _family("nv_model_load_duration_secs", "gauge", "Model load time in seconds", load),
    ]


def _language(models: Mapping[Key, ModelCounters]) -> Iterable[Family]:
    language = {key: counted.language.total for key, counted in models.items() if counted.language is not None}
    for name, text, histograms in (
        ("time_to_first_token_seconds", "Time from a request to its first token, whether or not it streams",
         {key: counted.time_to_first_token for key, counted in language.items()}),
        ("time_per_output_token_seconds", "Time per token of a request, from its first token to its end",
         {key: counted.time_per_output_token for key, counted in language.items()}),
        ("e2e_request_latency_seconds", "Time from a request to its end",
         {key: counted.latency for key, counted in language.items()}),
        ("queue_time_seconds", "Time that a request waited before it was begun",
         {key: counted.queue_time for key, counted in language.items()}),
    ):  # fmt: skip
        family = Family(f"hasten_{name}", "histogram", text)
        for key, histogram in histograms.items():
            family.add_histogram(_model(key), histogram)
        yield family
    prompts = {key: float(counted.prompt_tokens) for key, counted in language.items()}
    values = {key: float(counted.generation_tokens) for key, counted in language.items()}
    yield _family("hasten_prompt_tokens_total", "counter", "Tokens of prompts", prompts)
    yield _family("hasten_generation_tokens_total", "counter", "Tokens generated", values)
    texts = {key: float(counted.texts) for key, counted in language.items()}
    yield _family("hasten_texts_total", "counter", "Texts of which a vector or scores were made", texts)
    ends = Family("hasten_completions_total", "counter", "Completions by how they ended")
    for key, counted in language.items():
        for reason, count in counted.finished.items():
            ends.add({**_model(key), "reason": reason.value}, count)
    yield ends
