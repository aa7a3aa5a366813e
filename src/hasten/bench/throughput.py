"""Tokens a second on many requests of mixed lengths."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from hasten.bench.engines import Engine
from hasten.bench.peers import NotMeasured, differing, fastest, has_failed
from hasten.bench.report import Environment, print_table
from hasten.bench.workloads import Workload
from hasten.core.errors import ConfigError


@dataclass(frozen=True)
class ThroughputResult:
    """One engine on one workload; rates come from the median time."""

    engine: str
    workload: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: list[float]
    """Of each repetition."""
    median_seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    differing_requests: int | None
    """Requests of the last repetition to which the last engine gave other tokens; None for itself."""


class ThroughputReport(TypedDict):
    """What is written: each engine on one workload."""

    environment: Environment
    results: list[ThroughputResult]
    speedup: float | None
    compared_with: str | None
    """The engine that the speedup is of: the faster of Hugging Face's, where any is measured."""
    not_measured: list[NotMeasured]


def measure(
    engines: Sequence[Engine], workload: Workload, vocab_size: int, *, repetitions: int = 1
) -> list[ThroughputResult]:
    """Run the whole workload through every engine in turns, after a small untimed batch each, but failed peers."""
    if repetitions < 1:
        raise ConfigError(f"repetitions must be at least 1, got {repetitions}")
    rng = random.Random(0)
    few = Workload("warm-up", workload.prompt_lengths[:4], tuple(min(8, n) for n in workload.output_lengths[:4]))
    warmup = few.prompts(vocab_size, rng)
    for engine in engines:
        engine.generate(warmup, few.output_lengths)
    seconds: list[list[float]] = [[] for _ in engines]
    tokens: list[list[list[int]]] = []
    for _ in range(repetitions):
        prompts = workload.prompts(vocab_size, rng)
        generations = [engine.generate(prompts, workload.output_lengths) for engine in engines]
        tokens = [each.token_ids for each in generations]
        for times, each in zip(seconds, generations, strict=True):
            times.append(each.seconds)
    counts = [differing(each, tokens[-1]) for each in tokens[:-1]]
    return [
        _result(engine.label, workload, times, count)
        for engine, times, count in zip(engines, seconds, [*counts, None], strict=True)
        if not has_failed(engine)
    ]


def _result(engine: str, workload: Workload, seconds: list[float], count: int | None) -> ThroughputResult:
    median = statistics.median(seconds)
    prompt_tokens, output_tokens = sum(workload.prompt_lengths), sum(workload.output_lengths)
    return ThroughputResult(
        engine=engine,
        workload=workload.name,
        requests=len(workload.prompt_lengths),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seconds=seconds,
        median_seconds=median,
        requests_per_second=len(workload.prompt_lengths) / median,
        output_tokens_per_second=output_tokens / median,
        total_tokens_per_second=(prompt_tokens + output_tokens) / median,
        differing_requests=count,
    )


def speedup(results: Sequence[ThroughputResult]) -> tuple[float | None, str | None]:
    """How many times as fast the last engine is as another, and as which; None where there is one alone."""
    seconds = {result.engine: result.median_seconds for result in results[:-1]}
    quoted = fastest(seconds)
    return None if quoted is None else seconds[quoted] / results[-1].median_seconds, quoted


def show(results: Sequence[ThroughputResult]) -> None:
    """Print a table."""
    first = results[0]
    title = f"{first.workload}: {first.requests} requests, {first.prompt_tokens} tokens in, {first.output_tokens} out"
    ratio, quoted = speedup(results)
    if ratio is not None:
        title += f"; {results[-1].engine} is {ratio:.2f} times as fast as {quoted}"
    rows = [
        (
            result.engine,
            f"{result.median_seconds:.2f}",
            f"{result.requests_per_second:.2f}",
            f"{result.output_tokens_per_second:.1f}",
            f"{result.total_tokens_per_second:.1f}",
            "" if result.differing_requests is None else str(result.differing_requests),
        )
        for result in results
    ]
    columns = ("engine", "seconds", "requests/s", "output tokens/s", "tokens/s", "differing requests")
    print_table(title, columns, rows)
