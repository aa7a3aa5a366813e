"""The metrics under vLLM's names, of a real engine, as Prometheus's own parser reads them."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.engine_helpers import generate
from tests.waiting import LIMIT_S, attempts

from hasten.core.config import EngineConfig
from hasten.core.types import FinishReason, SamplingParams
from hasten.server.engine.client import EngineClient
from hasten.server.engine.counters import EngineCounters, LanguageCounters
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import CompletionDelta, Computed, FirstToken, Output
from hasten.server.metrics import Machine, Metrics
from hasten.server.statistics import Counters
from hasten.server.vllm_metrics import vllm_families

REQUEST_S: list[float] = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
TOKEN_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
FIRST_S: list[float] = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
]
FIRST_S += [640, 2560]
LENGTHS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
STEP: list[float] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
BLOCK_S: list[float] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300]
BLOCK_S += [600, 1200, 1800]
HISTOGRAMS: dict[str, list[float]] = {
    "vllm:time_to_first_token_seconds": FIRST_S,
    "vllm:inter_token_latency_seconds": TOKEN_S,
    "vllm:request_time_per_output_token_seconds": TOKEN_S,
    "vllm:e2e_request_latency_seconds": REQUEST_S,
    "vllm:request_queue_time_seconds": REQUEST_S,
    "vllm:request_inference_time_seconds": REQUEST_S,
    "vllm:request_prefill_time_seconds": REQUEST_S,
    "vllm:request_decode_time_seconds": REQUEST_S,
    "vllm:iteration_tokens_total": STEP,
    "vllm:request_params_n": [1, 2, 5, 10, 20],
    "vllm:request_prompt_tokens": LENGTHS,
    "vllm:request_generation_tokens": LENGTHS,
    "vllm:request_max_num_generation_tokens": LENGTHS,
    "vllm:request_params_max_tokens": LENGTHS,
    "vllm:request_prefill_kv_computed_tokens": LENGTHS,
}
BLOCKS: dict[str, list[float]] = {
    "vllm:kv_block_lifetime_seconds": BLOCK_S,
    "vllm:kv_block_idle_before_evict_seconds": BLOCK_S,
    "vllm:kv_block_reuse_gap_seconds": BLOCK_S,
}
"""Of a sample of blocks, not of each request."""
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
COUNTERS = (
    *("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions", "vllm:prompt_tokens"),
    *("vllm:prompt_tokens_cached", "vllm:generation_tokens", "vllm:estimated_flops_per_gpu"),
    *("vllm:estimated_read_bytes_per_gpu", "vllm:estimated_write_bytes_per_gpu"),
)
STORY = "Anna opened the door of the old house and looked at the garden"


@dataclass
class Served:
    """A service of one engine."""

    engine: EngineClient

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.counters["tokens", "1"].language = self.engine.counters

    def engines(self) -> dict[tuple[str, str], EngineClient]:
        return {("tokens", "1"): self.engine}

    def text_models(self) -> dict[str, str]:
        return {"story": "tokens"}

    def is_decoupled(self, model: str, version: str = "") -> bool:
        return False


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def exposed(engine: EngineClient) -> tuple[dict[str, str], Samples]:
    """Kinds of the families, and all samples without the labels that each has."""
    text = Metrics(cast(Any, Served(engine)), Machine(cpu=False, gpus=False)).text()
    kinds: dict[str, str] = {}
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("vllm:"):
            kinds[family.name] = family.type
            for sample in family.samples:
                labels = dict(sample.labels)
                assert (labels.pop("model_name"), labels.pop("engine")) == ("story", "0")
                samples[sample.name, frozenset(labels.items())] = sample.value
    return kinds, samples


def test_names_types_and_buckets_are_vllms(demo_engine: EngineClient) -> None:
    kinds, samples = exposed(demo_engine)
    # the parser splits the _total off counters, and this histogram's name ends with it
    expected = {name.removesuffix("_total"): "histogram" for name in {**HISTOGRAMS, **BLOCKS}}
    expected |= dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter")
    assert {name.removesuffix("_total"): kind for name, kind in kinds.items()}.items() >= expected.items()
    longest = demo_engine.info.max_model_len
    for name, bounds in {**HISTOGRAMS, **BLOCKS}.items():
        found = [float(dict(labels)["le"]) for each, labels in samples if each == f"{name}_bucket"]
        assert found == [*(b for b in bounds if bounds is not LENGTHS or b <= longest), float("inf")]
    reasons = {dict(labels)["finished_reason"] for name, labels in samples if name == "vllm:request_success_total"}
    assert reasons == {"stop", "length", "abort", "error"}
    (cache,) = [dict(labels) for name, labels in samples if name == "vllm:cache_config_info"]
    assert cache["block_size"] == str(demo_engine.info.block_size)
    assert cache["num_gpu_blocks"] == str(demo_engine.info.num_blocks)


async def computed(engine: EngineClient, prompt: str | list[int], *, stream: bool, n: int = 1, tokens: int = 5) -> None:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, n=n)
    async with aclosing(generate(engine, prompt, params, stream=stream)) as progresses:
        async for _ in progresses:
            pass


def test_requests_count_alike_whether_or_not_they_stream(demo_engine: EngineClient, run: Callable[..., Any]) -> None:
    async def compute() -> tuple[Samples, Samples]:
        _, before = exposed(demo_engine)
        await computed(demo_engine, STORY, stream=True)
        await computed(demo_engine, STORY, stream=False)
        await computed(demo_engine, STORY, stream=False, n=2)
        return before, exposed(demo_engine)[1]

    before, after = run(compute())
    new = {key: value - before[key] for key, value in after.items()}
    prompt = len(cast(Any, demo_engine.tokenizer).encode(STORY))
    count = {name: new[f"{name}_count", frozenset()] for name in HISTOGRAMS}
    total = {name: new[f"{name}_sum", frozenset()] for name in HISTOGRAMS}
    assert count.pop("vllm:inter_token_latency_seconds") == 4 * 4
    assert count.pop("vllm:iteration_tokens_total") >= 3 * 5
    assert set(count.values()) == {3}
    assert new["vllm:prompt_tokens_total", frozenset()] == total["vllm:request_prompt_tokens"] == 3 * prompt
    assert new["vllm:generation_tokens_total", frozenset()] == total["vllm:request_generation_tokens"] == 20
    assert total["vllm:request_params_max_tokens"] == 15
    assert total["vllm:request_params_n"] == 4
    cached = new["vllm:prompt_tokens_cached_total", frozenset()]
    assert cached >= 2 * (prompt // demo_engine.info.block_size) * demo_engine.info.block_size > 0
    assert cached == new["vllm:prefix_cache_hits_total", frozenset()]
    assert new["vllm:prefix_cache_queries_total", frozenset()] >= cached
    assert total["vllm:request_prefill_kv_computed_tokens"] == 3 * prompt - cached
    # no step computes a completion's last token; the second one of a prompt computes the prompt's last token anew
    assert total["vllm:iteration_tokens_total"] == 3 * prompt - cached + 1 + 4 * 4
    ends = {dict(labels)["finished_reason"]: v for (name, labels), v in new.items() if name.endswith("success_total")}
    assert ends == {"length": 4, "stop": 0, "abort": 0, "error": 0}
    whole = total["vllm:request_queue_time_seconds"] + total["vllm:request_inference_time_seconds"]
    assert whole == pytest.approx(total["vllm:e2e_request_latency_seconds"])
    parts = total["vllm:request_prefill_time_seconds"] + total["vllm:request_decode_time_seconds"]
    assert parts == pytest.approx(total["vllm:request_inference_time_seconds"])
    for name in ("flops", "read_bytes", "write_bytes"):
        assert new[f"vllm:estimated_{name}_per_gpu_total", frozenset()] > 0


def test_blocks_of_an_engines_cache_are_watched(demo_model: Path, run: Callable[..., Any]) -> None:
    async def turn_over() -> tuple[Samples, float]:
        """Take more blocks than a small cache has, each twice; what is known then, and the seconds it took."""
        began = time.monotonic()
        engine = await EngineClient.start(EngineConfig.create(str(demo_model), kv_cache_memory="16M"))
        try:
            info = engine.info
            for prompt in range(4 * info.num_blocks * info.block_size // 500):
                for _ in range(2):
                    await computed(engine, [prompt % info.vocab_size, *range(1, 500)], stream=False, tokens=1)
            return exposed(engine)[1], time.monotonic() - began
        finally:
            await engine.close()

    samples, seconds = run(turn_over())
    count = {name: samples[f"{name}_count", frozenset()] for name in BLOCKS}
    # one in 64 of some 4 times the cache's blocks; those of the last time that it was filled are still there
    assert all(value > 0 for value in count.values()), count
    assert count["vllm:kv_block_lifetime_seconds"] >= count["vllm:kv_block_idle_before_evict_seconds"]
    total = {name: samples[f"{name}_sum", frozenset()] for name in BLOCKS}
    assert total["vllm:kv_block_lifetime_seconds"] > total["vllm:kv_block_idle_before_evict_seconds"] > 0
    assert all(0 < total[name] <= seconds * count[name] for name in BLOCKS)


def test_a_client_that_leaves_counts_as_an_abort(demo_engine: EngineClient, run: Callable[..., Any]) -> None:
    def aborts() -> int:
        return demo_engine.counters.total.finished[FinishReason.ABORT]

    async def leave() -> bool:
        """Whether there was more to come of a stream that is left."""
        stream = generate(demo_engine, STORY, SamplingParams(max_tokens=1500, ignore_eos=True))
        more = not (await anext(stream)).finished
        await stream.aclose()
        async with asyncio.timeout(LIMIT_S):
            while demo_engine.stats().running:
                await asyncio.sleep(0.01)
        return more

    before = aborts()
    for number in attempts("a stream that is left before its end"):
        left = run(leave())
        assert aborts() <= before + number + 1
        if left and aborts() > before:
            break
    after = aborts()
    run(computed(demo_engine, STORY, stream=True))
    assert aborts() == after


def ticket(counters: EngineCounters, *outputs: Output, arrived: float = 100.0, begun: float = 101.0) -> Ticket:
    """A request with a prompt of 7 tokens whose outputs came, the last one at 110.0."""
    result = Ticket(1, tuple(range(7)), 1, bytearray(), max_tokens=9, arrived=arrived)
    result.begin(begun)
    for output in outputs:
        is_first, tokens = not result.has_output, result.tokens
        result.push(output)
        if is_first:
            counters.begin(result)
        counters.add(output, result.tokens - tokens)
    counters.finish(result, 110.0)
    return result


def test_the_parts_of_a_request_add_up() -> None:
    counters = EngineCounters()
    first = Output(1, [CompletionDelta(0, [5], "a")], False, first=FirstToken(103.0, 4))
    ticket(counters, first, Output(1, [CompletionDelta(0, [5] * 3, "b", finish_reason=FinishReason.STOP)], True))
    assert (counters.time_to_first_token.total, counters.queue_time.total, counters.prefill_time.total) == (3, 1, 2)
    assert (counters.decode_time.total, counters.inference_time.total, counters.latency.total) == (7, 9, 10)
    assert counters.time_per_output_token.total == pytest.approx(7 / 3)
    assert (counters.prompt_tokens, counters.cached_tokens, counters.generation_tokens) == (7, 4, 4)
    assert counters.computed_lengths.total == 3
    assert counters.finished[FinishReason.STOP] == 1


def test_a_step_counts_once_for_each_completion_that_it_continued() -> None:
    counters = EngineCounters()
    for computed_step in (Computed(40, 9.0, 0), Computed(8, 0.02, 8), Computed(9, 0.06, 7)):
        counters.step(computed_step)
    assert counters.step_tokens.total == 57
    assert counters.inter_token_latency.count == 15
    assert counters.inter_token_latency.total == pytest.approx(0.02 * 8 + 0.06 * 7)
    shown = counters.inter_token_latency.within(TOKEN_S)
    assert shown.counts[TOKEN_S.index(0.025)] == 8
    assert shown.counts[TOKEN_S.index(0.075)] == 7
    assert shown.count == 15


def test_each_engine_of_a_model_has_samples_and_the_queue_is_the_first_ones() -> None:
    counters = LanguageCounters()
    counters.of(1).generation_tokens = 6
    counters.of(0).generation_tokens = 2
    info = SimpleNamespace(max_model_len=64, block_size=16, num_blocks=4, cache_dtype="int8")
    stats = SimpleNamespace(
        **dict.fromkeys(("running", "waiting", "used_blocks", "num_blocks", "preemptions"), 1),
        **dict.fromkeys(("prefix_query_tokens", "prefix_hit_tokens"), 1),
        **{f"estimated_{name}": 1.0 for name in ("flops", "read_bytes", "write_bytes")},
    )
    replicas = [SimpleNamespace(stats=lambda: stats, info=info)] * 2
    client = SimpleNamespace(
        replicas=replicas,
        counters=counters,
        num_queued=5,
        info=info,
        refused=dict.fromkeys(("queue_full", "queue_timeout", "queue_wait"), 3),
    )
    text = "".join(family.text() for family in vllm_families({"m": cast(Any, client)}))
    assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 2\n' in text
    assert 'vllm:generation_tokens_total{engine="1",model_name="m"} 6\n' in text
    assert 'vllm:num_requests_waiting{engine="0",model_name="m"} 6\n' in text
    assert 'vllm:num_requests_waiting{engine="1",model_name="m"} 1\n' in text
    assert 'vllm:admission_rejections_total{engine="0",model_name="m",reason="queue_full"} 3\n' in text
    assert 'cache_dtype="int8"' in text
    assert counters.total.generation_tokens == 8
