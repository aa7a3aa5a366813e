import sys
import types
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hasten.engine.stats import EngineStats
from hasten.server.access import AccessLog
from hasten.server.engine.counters import LanguageCounters
from hasten.server.engine.link import Delivery
from hasten.server.exposition import Family, Histogram
from hasten.server.inflight import InflightBytes
from hasten.server.machine import CpuMeter, GpuMeter
from hasten.server.metrics import Machine, Metrics
from hasten.server.statistics import Counters, FailureReason
from hasten.server.types import ErrorKind, ServiceError

TRITON = {  # of Triton 2.51.0 on a machine without GPUs, but for its pinned memory
    "nv_inference_request_success": "counter",
    "nv_inference_request_failure": "counter",
    "nv_inference_count": "counter",
    "nv_inference_exec_count": "counter",
    "nv_inference_request_duration_us": "counter",
    "nv_inference_queue_duration_us": "counter",
    "nv_inference_compute_input_duration_us": "counter",
    "nv_inference_compute_infer_duration_us": "counter",
    "nv_inference_compute_output_duration_us": "counter",
    "nv_inference_pending_request_count": "gauge",
    "nv_cpu_utilization": "gauge",
    "nv_cpu_memory_total_bytes": "gauge",
    "nv_cpu_memory_used_bytes": "gauge",
}
OWN = {
    "hasten_time_to_first_token_seconds": "histogram",
    "hasten_time_per_output_token_seconds": "histogram",
    "hasten_e2e_request_latency_seconds": "histogram",
    "hasten_queue_time_seconds": "histogram",
    "hasten_prompt_tokens_total": "counter",
    "hasten_generation_tokens_total": "counter",
    "hasten_requests_running": "gauge",
    "hasten_requests_waiting": "gauge",
    "hasten_requests_refused_total": "counter",
    "hasten_estimated_wait_seconds": "gauge",
    "hasten_token_delivery_seconds": "histogram",
    "hasten_kv_cache_usage_ratio": "gauge",
    "hasten_prefix_cache_hit_tokens_total": "counter",
    "hasten_prefix_cache_query_tokens_total": "counter",
    "hasten_preemptions_total": "counter",
    "hasten_engine_mixed_steps_total": "counter",
    "hasten_engine_limited_steps_total": "counter",
    "hasten_engine_mixed_step_seconds_total": "counter",
    "hasten_engine_mixed_step_predicted_seconds_total": "counter",
    "hasten_replica_ready": "gauge",
    "hasten_replica_restarts_total": "counter",
    "hasten_replica_requests_running": "gauge",
    "hasten_replica_requests_waiting": "gauge",
    "hasten_replica_kv_cache_usage_ratio": "gauge",
    "hasten_replica_prefix_cache_hit_tokens_total": "counter",
    "hasten_replica_prompt_tokens_total": "counter",
    "hasten_replica_generation_tokens_total": "counter",
    "hasten_inflight_request_bytes": "gauge",
    "hasten_inflight_refusals_total": "counter",
}

REASONS = ("queue_full", "queue_timeout", "queue_wait")


@dataclass
class Engine:
    now: EngineStats
    restarts: int = 3
    refused: Counter[str] = field(default_factory=lambda: Counter(queue_wait=5))
    wait: float | None = 2.5
    delivery: Delivery = field(default_factory=Delivery)
    ready: bool = True
    replicas: list["Engine"] = field(default_factory=list)
    counters: LanguageCounters = field(default_factory=LanguageCounters)
    num_queued: int = 1
    info: Any = field(
        default_factory=lambda: types.SimpleNamespace(max_model_len=300, block_size=16, num_blocks=20, cache_dtype=None)
    )

    def stats(self) -> EngineStats:
        return self.now

    def estimated_wait(self) -> float | None:
        return self.wait


@dataclass
class Counted:
    """A service of which only the counters are looked at."""

    counters: Counters = field(default_factory=Counters)
    running: dict[tuple[str, str], Engine] = field(default_factory=dict)

    def engines(self) -> dict[tuple[str, str], Engine]:
        return self.running

    def text_models(self) -> dict[str, str]:
        return {"story": "tokens"}

    def is_decoupled(self, model: str, version: str = "") -> bool:
        if model == "gone":
            raise ServiceError(ErrorKind.NOT_FOUND, "unloaded")
        return model == "streams"


@pytest.fixture
def service() -> Counted:
    service = Counted()
    service.counters["tokens", "1"].language = LanguageCounters()
    for name in ("streams", "gone"):
        service.counters[name, "2"]
    stats = EngineStats(running=3, waiting=4, used_blocks=5, num_blocks=20, preemptions=6, prefix_hit_tokens=7)
    stats = replace(stats, mixed_steps=12, limited_steps=3, mixed_seconds=0.5, predicted_mixed_seconds=0.25)
    parts = [Engine(replace(stats, running=running, used_blocks=4 * running)) for running in (1, 2)]
    parts[1].ready, parts[1].restarts = False, 2
    service.running["tokens", "1"] = Engine(stats, replicas=parts)
    return service


def exposed(service: Counted) -> tuple[dict[str, str], dict[tuple[str, tuple[tuple[str, str], ...]], float]]:
    """Kinds of all metrics, and all samples, as Prometheus's own parser reads them."""
    text = Metrics(cast(Any, service)).text()
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name not in kinds, "all samples of a metric stand together"
            kinds[name] = kind
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            # the parser has all counters end in _total
            name = sample.name if family.type != "counter" or sample.name in kinds else sample.name[: -len("_total")]
            key = (name, tuple(sorted(sample.labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return kinds, samples


def of(model: str, version: str, **labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"model": model, "version": version, **labels}.items()))


def test_all_names_are_there_with_their_kinds(service: Counted) -> None:
    kinds, _ = exposed(service)
    assert (TRITON | OWN).items() <= kinds.items()


def test_the_server_is_exposed_too(service: Counted) -> None:
    access = AccessLog()
    access.counts["openai", "429"] += 2
    inflight = InflightBytes(10)
    inflight.hold(7)
    with pytest.raises(ServiceError):
        inflight.hold(4)
    text = Metrics(cast(Any, service), Machine(cpu=False, gpus=False), access, inflight).text()
    assert "hasten_inflight_request_bytes 7\n" in text
    assert "hasten_inflight_refusals_total 1\n" in text
    assert 'hasten_api_calls_total{api="openai",status="429"} 2\n' in text
    assert 'hasten_engine_restarts_total{model="tokens",version="1"} 3\n' in text


def test_counters_are_there_at_0_from_the_start(service: Counted) -> None:
    _, samples = exposed(service)
    for key in (("tokens", "1"), ("streams", "2"), ("gone", "2")):
        for name in TRITON:
            if name.startswith("nv_inference") and name != "nv_inference_request_failure":
                assert samples[name, of(*key)] == 0
        for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
            assert samples["nv_inference_request_failure", of(*key, reason=reason)] == 0
    for name in ("hasten_prompt_tokens_total", "hasten_generation_tokens_total"):
        assert samples[name, of("tokens", "1")] == 0


def test_what_was_counted_is_exposed(service: Counted) -> None:
    counters = service.counters["tokens", "1"]
    counters.durations.add("success", 3_000_000)
    counters.durations.add("queue", 5000)
    counters.failures[FailureReason.REJECTED] += 2
    counters.inference_count, counters.execution_count, counters.pending = 8, 1, 4
    counters.load_seconds = 1.5
    assert counters.language is not None
    engine = counters.language.of(0)
    engine.prompt_tokens, engine.generation_tokens = 100, 20
    service.running["tokens", "1"].delivery.write.observe(0.002)
    _, samples = exposed(service)
    key = of("tokens", "1")
    assert samples["hasten_token_delivery_seconds_sum", of("tokens", "1", stage="write")] == 0.002
    assert samples["hasten_token_delivery_seconds_count", of("tokens", "1", stage="socket")] == 0
    assert samples["nv_inference_request_success", key] == 1
    assert samples["nv_inference_request_duration_us", key] == 3000
    assert samples["nv_inference_queue_duration_us", key] == 5
    assert samples["nv_inference_request_failure", of("tokens", "1", reason="REJECTED")] == 2
    assert samples["nv_inference_count", key] == 8
    assert samples["nv_inference_pending_request_count", key] == 4
    assert samples["nv_model_load_duration_secs", key] == 1.5
    assert samples["hasten_prompt_tokens_total", key] == 100
    assert samples["hasten_generation_tokens_total", key] == 20
    assert samples["hasten_requests_running", key] == 3
    assert samples["hasten_requests_waiting", key] == 4
    assert samples["hasten_kv_cache_usage_ratio", key] == 0.25
    assert samples["hasten_preemptions_total", key] == 6
    assert samples["hasten_engine_mixed_steps_total", key] == 12
    assert samples["hasten_engine_limited_steps_total", key] == 3
    assert samples["hasten_engine_mixed_step_seconds_total", key] == 0.5
    assert samples["hasten_engine_mixed_step_predicted_seconds_total", key] == 0.25
    refused = {reason: samples["hasten_requests_refused_total", of("tokens", "1", reason=reason)] for reason in REASONS}
    assert refused == {"queue_full": 0, "queue_timeout": 0, "queue_wait": 5}
    assert samples["hasten_estimated_wait_seconds", key] == 2.5
    assert samples["hasten_prefix_cache_hit_tokens_total", key] == 7
    first, second = (of("tokens", "1", replica=index) for index in "01")
    assert [samples["hasten_replica_ready", each] for each in (first, second)] == [1, 0]
    assert [samples["hasten_replica_restarts_total", each] for each in (first, second)] == [3, 2]
    assert [samples["hasten_replica_requests_running", each] for each in (first, second)] == [1, 2]
    assert [samples["hasten_replica_kv_cache_usage_ratio", each] for each in (first, second)] == [0.2, 0.4]


def test_histograms_are_cumulative(service: Counted) -> None:
    language = service.counters["tokens", "1"].language
    assert language is not None
    for seconds in (0.005, 0.006, 0.3, 1000):
        language.of(0).time_to_first_token.observe(seconds)
    _, samples = exposed(service)
    name = "hasten_time_to_first_token_seconds"
    buckets = [
        (float(dict(labels)["le"]), value) for (found, labels), value in samples.items() if found == f"{name}_bucket"
    ]
    assert buckets == sorted(buckets)
    assert [value for _, value in buckets] == sorted(value for _, value in buckets)
    assert dict(buckets)[0.005] == 1
    assert dict(buckets)[0.01] == 2
    assert buckets[-1] == (float("inf"), 4)
    assert samples[f"{name}_count", of("tokens", "1")] == 4
    assert samples[f"{name}_sum", of("tokens", "1")] == pytest.approx(1000.311)


def test_only_decoupled_models_have_a_time_to_the_first_response(service: Counted) -> None:
    _, samples = exposed(service)
    models = {dict(labels)["model"] for name, labels in samples if name.startswith("nv_inference_first_response")}
    assert models == {"streams"}
    service.counters["gone", "2"].first_response_ms.observe(7)  # it was, before it was unloaded
    _, samples = exposed(service)
    assert samples["nv_inference_first_response_histogram_ms_count", of("gone", "2")] == 1


def test_names_of_models_may_have_any_characters() -> None:
    family = Family("x", "gauge", "help")
    family.add({"model": 'a"b\\c\nd é'}, 1)
    (read,) = text_string_to_metric_families(family.text())
    assert read.samples[0].labels == {"model": 'a"b\\c\nd é'}


def test_a_metric_without_samples_is_left_out() -> None:
    assert Family("x", "gauge", "help").text() == ""


def test_numbers_are_exact() -> None:
    family = Family("x", "counter", "help")
    family.add({}, 2**53)
    family.add({}, Histogram((0.1,)))
    assert f"x {2**53}\n" in family.text()
    assert 'x_bucket{le="0.1"} 0\n' in family.text()
    assert 'x_bucket{le="+Inf"} 0\n' in family.text()


def test_the_processors_and_the_memory_are_those_of_the_machine() -> None:
    meter = CpuMeter()
    total = 0
    for number in range(2_000_000):  # some work to see
        total += number
    reading = meter.read()
    assert total
    assert 0 <= reading["nv_cpu_utilization"] <= 1
    assert 0 < reading["nv_cpu_memory_used_bytes"] < reading["nv_cpu_memory_total_bytes"]


class NVMLError(Exception):
    pass


def fake_nvml(energy: list[float]) -> types.ModuleType:
    """Pynvml as on a machine with one GPU that does not tell its power limit."""
    module = types.ModuleType("pynvml")

    def unknown(handle: object) -> int:
        raise NVMLError

    functions: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: "GPU-1",
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=50),
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=2000, used=500),
        "nvmlDeviceGetPowerUsage": lambda handle: 70_000,
        "nvmlDeviceGetPowerManagementLimit": unknown,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: energy[0],
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def test_gpus_are_told_where_there_are_any(service: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    energy = [5000.0]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(energy))
    meter = GpuMeter()
    assert meter.read()["GPU-1"]["nv_energy_consumption"] == 0
    energy[0] = 8000.0
    assert meter.read()["GPU-1"] == {
        "nv_gpu_utilization": 0.5,
        "nv_gpu_memory_total_bytes": 2000,
        "nv_gpu_memory_used_bytes": 500,
        "nv_gpu_power_usage": 70,
        "nv_energy_consumption": 3,
    }
    _, samples = exposed(service)
    assert samples["nv_gpu_memory_used_bytes", (("gpu_uuid", "GPU-1"),)] == 500
    assert not [name for name, _ in samples if name == "nv_gpu_power_limit"]
    assert Machine().sources() == ["metrics for GPU 0: NVIDIA H200", "CPU metrics"]
    assert all("cpu" in family.name for family in Machine(gpus=False).families() if family.samples)
    assert all("cpu" not in family.name for family in Machine(cpu=False).families())


def test_the_machine_is_measured_once_in_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hasten.server.metrics.time.monotonic", lambda: now[0])
    machine = Machine(gpus=False, interval=2.0)
    first = machine.families()
    now[0] = 101.9
    assert machine.families() is first
    now[0] = 102.0
    assert machine.families() is not first


def test_without_nvidias_library_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter().read() == {}
    assert Machine(cpu=False).sources() == []
