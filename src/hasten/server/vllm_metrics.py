"""The same metrics under vLLM's names: inference gateways, autoscalers and dashboards that know vLLM know hasten.

Each sample has the labels `model_name`, as OpenAI's API calls the model, and `engine`, the number of the engine.
Requests that no engine has got yet count as engine 0's. Histograms have vLLM's buckets.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from hasten.server.exposition import Family, Labels

if TYPE_CHECKING:
    from hasten.engine.stats import EngineStats
    from hasten.server.engine.client import EngineClient
    from hasten.server.engine.replica import Replica

_STATS: Sequence[tuple[str, str, str, "Callable[[EngineStats], float]"]] = (
    ("num_requests_running", "gauge", "Requests in execution", lambda stats: stats.running),
    ("num_requests_waiting", "gauge", "Requests that wait to be executed", lambda stats: stats.waiting),
    ("kv_cache_usage_perc", "gauge", "Share of the key/value cache in use; 1 is all of it",
     lambda stats: stats.used_blocks / max(1, stats.num_blocks)),
    ("prefix_cache_queries_total", "counter", "Tokens that were looked up in the prefix cache",
     lambda stats: stats.prefix_query_tokens),
    ("prefix_cache_hits_total", "counter", "Tokens that were found in the prefix cache",
     lambda stats: stats.prefix_hit_tokens),
    ("num_preemptions_total", "counter", "Times that a request was preempted", lambda stats: stats.preemptions),
)  # fmt: skip
_ESTIMATES: Sequence[tuple[str, str, "Callable[[EngineStats], float]"]] = (
    ("flops", "Estimated floating point operations of each GPU", lambda stats: stats.estimated_flops),
    ("read_bytes", "Estimated bytes that each GPU read from its memory", lambda stats: stats.estimated_read_bytes),
    ("write_bytes", "Estimated bytes that each GPU wrote to its memory", lambda stats: stats.estimated_write_bytes),
)
_COUNTERS: Sequence[tuple[str, str, Callable[[EngineCounters], float]]] = (
    ("prompt_tokens_total", "Tokens of prompts", lambda counters: counters.prompt_tokens),
    ("prompt_tokens_cached_total", "Tokens of prompts that were in the prefix cache",
     lambda counters: counters.cached_tokens),
    ("generation_tokens_total", "Tokens generated", lambda counters: counters.generation_tokens),
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
    ("request_params_n", "completions", "Completions that a request asked for", COMPLETIONS),
    ("request_prompt_tokens", "prompt_lengths", "Tokens of a request's prompt", None),
    ("request_generation_tokens", "output_lengths", "Tokens generated for a request", None),
    ("request_max_num_generation_tokens", "max_tokens", "Tokens that a completion may have", None),
    ("request_params_max_tokens", "max_tokens", "Tokens that a completion may have", None),
    ("request_prefill_kv_computed_tokens", "computed_lengths", "Tokens of a prompt that were not cached", None),
)  # fmt: skip
"""Name, histogram, help and bounds; None: 1, 2, 5, 10 … up to the model's maximum length."""


def vllm_families(models: "Mapping[str, EngineClient]") -> Iterator[Family]:
    """All metrics of engines, by the names of their models."""
    engines = [
        ({"model_name": name, "engine": str(index)}, replica, client.counters.of(index))
        for name, client in models.items()
        for index, replica in enumerate(client.replicas)
    ]
    yield from _of_stats(models, engines)
    yield from _of_requests(models, engines)
    info = Family("vllm:cache_config_info", "gauge", "Always 1; the key/value cache is described by the labels")
    for labels, replica, _ in engines:
        about = replica.info
        cache = {"block_size": about.block_size, "num_gpu_blocks": about.num_blocks}
        info.add({**labels, **_texts(cache), "cache_dtype": about.cache_dtype or "auto"}, 1)
    yield info


_Engines = Iterable[tuple[Labels, "Replica", EngineCounters]]


def _texts(numbers: Mapping[str, int]) -> dict[str, str]:
    return {name: str(number) for name, number in numbers.items()}


def _of_stats(models: "Mapping[str, EngineClient]", engines: _Engines) -> Iterator[Family]:
    stats = [(labels, replica.stats()) for labels, replica, _ in engines]
    queued = {name: client.num_queued for name, client in models.items()}
    for name, kind, text, value in _STATS:
        family = Family(f"vllm:{name}", kind, text)
        for labels, now in stats:
            waits = name == "num_requests_waiting" and labels["engine"] == "0"
            family.add(labels, value(now) + (queued[labels["model_name"]] if waits else 0))
        yield family
    for name, text, value in _ESTIMATES:
        family = Family(f"vllm:estimated_{name}_per_gpu_total", "counter", text)
        for labels, now in stats:
            family.add(labels, value(now))
        yield family


def _of_requests(models: "Mapping[str, EngineClient]", engines: _Engines) -> Iterator[Family]:
    for name, text, value in _COUNTERS:
        family = Family(f"vllm:{name}", "counter", text)
        for labels, _, counters in engines:
            family.add(labels, value(counters))
        yield family
    ends = Family("vllm:request_success_total", "counter", "Completions by how they ended")
    for labels, _, counters in engines:
        for finished_reason, count in counters.finished.items():
            ends.add({**labels, "finished_reason": finished_reason.value}, count)
    yield ends
    refused = Family("vllm:admission_rejections_total", "counter", "Requests that were refused, by the reason")
    for name, client in models.items():
        for reason in QUEUE_REASONS:
            refused.add({"model_name": name, "engine": "0", "reason": reason}, client.refused[reason])
    yield refused
    for name, attribute, text, bounds in _HISTOGRAMS:
        family = Family(f"vllm:{name}", "histogram", text)
        for labels, _, counters in engines:
            histogram = getattr(counters, attribute)
            most = models[labels["model_name"]].info.max_model_len
            shown = bounds or [bound for bound in histogram.bounds if bound <= most]
            family.add_histogram(labels, histogram.within(shown))
        yield family
