"""The same metrics under vLLM's names: inference gateways, autoscalers and dashboards that know vLLM know hasten.

Each sample has the labels `model_name`, as OpenAI's API calls the model, and `engine`, the number of the engine.
Requests that no engine has got yet count as engine 0's. Histograms have vLLM's buckets.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING

from hasten.server.engine.counters import (
    BLOCK_S,
    COMPLETIONS,
    FIRST_TOKEN_S,
    REQUEST_S,
    STEP_TOKENS,
    TOKEN_S,
    EngineCounters,
)
from hasten.server.engine.queue import QUEUE_REASONS
from hasten.server.exposition import Family, Histogram, Metric, families

if TYPE_CHECKING:
    from hasten.engine.stats import EngineStats
    from hasten.server.engine.client import EngineClient


@dataclass(frozen=True)
class _Engine:
    """One engine of a model."""

    index: int
    client: "EngineClient"

    @property
    def stats(self) -> "EngineStats":
        return self.client.replicas[self.index].stats()

    @property
    def counters(self) -> EngineCounters:
        return self.client.counters.of(self.index)

    def histogram(self, attribute: str, bounds: Sequence[float] | None) -> Histogram:
        """One of its counters' histograms, with these bounds; None: up to the model's maximum length."""
        histogram: Histogram = getattr(self.counters, attribute)
        most = self.client.info.max_model_len
        return histogram.within(bounds or [bound for bound in histogram.bounds if bound <= most])


def cache_usage(stats: "EngineStats") -> float:
    """Share of the blocks of a key/value cache that is in use."""
    return stats.used_blocks / max(1, stats.num_blocks)


_METRICS: Sequence[Metric] = (
    Metric("num_requests_running", "gauge", "Requests in execution", "stats.running"),
    Metric("num_requests_waiting", "gauge", "Requests that wait to be executed",
           lambda engine: engine.stats.waiting + (0 if engine.index else engine.client.num_queued)),
    Metric("kv_cache_usage_perc", "gauge", "Share of the key/value cache in use; 1 is all of it",
           lambda engine: cache_usage(engine.stats)),
    Metric("prefix_cache_queries_total", "counter", "Tokens that were looked up in the prefix cache",
           "stats.prefix_query_tokens"),
    Metric("prefix_cache_hits_total", "counter", "Tokens that were found in the prefix cache",
           "stats.prefix_hit_tokens"),
    Metric("num_preemptions_total", "counter", "Times that a request was preempted", "stats.preemptions"),
    Metric("estimated_flops_per_gpu_total", "counter", "Estimated floating point operations of each GPU",
           "stats.estimated_flops"),
    Metric("estimated_read_bytes_per_gpu_total", "counter", "Estimated bytes that each GPU read from its memory",
           "stats.estimated_read_bytes"),
    Metric("estimated_write_bytes_per_gpu_total", "counter", "Estimated bytes that each GPU wrote to its memory",
           "stats.estimated_write_bytes"),
    Metric("prompt_tokens_total", "counter", "Tokens of prompts", "counters.prompt_tokens"),
    Metric("prompt_tokens_cached_total", "counter", "Tokens of prompts that were in the prefix cache",
           "counters.cached_tokens"),
    Metric("generation_tokens_total", "counter", "Tokens generated", "counters.generation_tokens"),
    Metric("request_success_total", "counter", "Completions by how they ended", "counters.finished", "finished_reason"),
)  # fmt: skip
_OF_MODELS: Sequence[Metric] = (
    Metric("admission_rejections_total", "counter", "Requests that were refused, by the reason",
           lambda client: {reason: client.refused[reason] for reason in QUEUE_REASONS}, "reason"),
)  # fmt: skip
_HISTOGRAMS: Sequence[tuple[str, str, str, Sequence[float] | None]] = (
    ("time_to_first_token_seconds", "time_to_first_token", "Time to the first token", FIRST_TOKEN_S),
    ("inter_token_latency_seconds", "inter_token_latency", "Time from a token to the next one", TOKEN_S),
    ("request_time_per_output_token_seconds", "time_per_output_token", "Time per output token of a request", TOKEN_S),
    ("e2e_request_latency_seconds", "latency", "Time from a request to its end", REQUEST_S),
    ("request_queue_time_seconds", "queue_time", "Time that a request waited", REQUEST_S),
    ("request_inference_time_seconds", "inference_time", "Time that a request was executed", REQUEST_S),
    ("request_prefill_time_seconds", "prefill_time", "Time of a request's prefill", REQUEST_S),
    ("request_decode_time_seconds", "decode_time", "Time of a request's decode", REQUEST_S),
    ("iteration_tokens_total", "step_tokens", "Tokens of a step of the engine", STEP_TOKENS),
    ("kv_block_lifetime_seconds", "block_lifetime",
     "Time from the allocation of a block of the key/value cache until its content was lost, of one in 64", BLOCK_S),
    ("kv_block_idle_before_evict_seconds", "block_idle",
     "Time that a block of the key/value cache was unused until it was evicted, of one in 64", BLOCK_S),
    ("kv_block_reuse_gap_seconds", "block_reuse_gap",
     "Time between two uses of a block of the key/value cache, of one in 64", BLOCK_S),
    ("request_params_n", "completions", "Completions per request", COMPLETIONS),
    ("request_prompt_tokens", "prompt_lengths", "Tokens of a request's prompt", None),
    ("request_generation_tokens", "output_lengths", "Tokens generated for a request", None),
    ("request_max_num_generation_tokens", "max_tokens", "Tokens that a completion may have", None),
    ("request_params_max_tokens", "max_tokens", "Tokens that a completion may have", None),
    ("request_prefill_kv_computed_tokens", "computed_lengths", "Tokens of a prompt that were not cached", None),
)  # fmt: skip
"""Name, histogram, help and bounds; None: 1, 2, 5, 10 … up to the model's maximum length."""


def vllm_families(models: "Mapping[str, EngineClient]") -> Iterator[Family]:
    """All metrics of engines, by the names of their models."""
    clients = [({"model_name": name, "engine": "0"}, client) for name, client in models.items()]
    engines = [
        ({**labels, "engine": str(index)}, _Engine(index, client))
        for labels, client in clients
        for index in range(len(client.replicas))
    ]
    yield from families("vllm:", _METRICS, engines)
    yield from families("vllm:", _OF_MODELS, clients)
    for name, attribute, text, bounds in _HISTOGRAMS:
        value = methodcaller("histogram", attribute, bounds)
        yield from families("vllm:", (Metric(name, "histogram", text, value),), engines)
    info = Family("vllm:cache_config_info", "gauge", "Always 1; the key/value cache is described by the labels")
    for labels, engine in engines:
        about = engine.client.replicas[engine.index].info
        cache = {"block_size": str(about.block_size), "num_gpu_blocks": str(about.num_blocks)}
        info.add({**labels, **cache, "cache_dtype": about.cache_dtype or "auto"}, 1)
    yield info
