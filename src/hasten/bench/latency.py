"""Time to the first token and time a token, for batches of equal requests."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypedDict

from hasten.bench.engines import Engine
from hasten.bench.peers import NotMeasured, differing, fastest, has_failed
from hasten.bench.report import Environment, Spread, print_table
from hasten.bench.workloads import Workload
from hasten.core.errors import ConfigError


@dataclass(frozen=True)
class LatencyResult:
    """Milliseconds of one engine on one batch size, over repetitions."""

    engine: str
    batch_size: int
    prompt_length: int
    output_length: int
    repetitions: int
    first_token_ms: Spread
    """A call that makes one token a request."""
    token_ms: Spread
    """What each further token adds: a step of the whole batch."""
    total_ms: Spread
    """A call that makes all tokens."""
    decode_tokens_per_second: float
    """Tokens of the whole batch, at the best time a token."""
    differing_requests: int | None
    """Requests of the last repetition to which the last engine gave other tokens; None for itself."""


def measure(engines: Sequence[Engine], workload: Workload, vocab_size: int, *, repetitions: int) -> list[LatencyResult]:
    """Time every engine on a batch of equal requests; the engines take turns, after one untimed call each.

    Failed peers are left out.
    """
    output_length = workload.output_lengths[0]
    if output_length < 2 or repetitions < 1:
        raise ConfigError("latency needs an output length of at least 2 and at least 1 repetition")
    rng = random.Random(0)
    ones = [1] * len(workload.prompt_lengths)
    warmup = workload.prompts(vocab_size, rng)
    for engine in engines:
        engine.generate(warmup, workload.output_lengths)
    first: list[list[float]] = [[] for _ in engines]
    total: list[list[float]] = [[] for _ in engines]
    tokens: list[list[list[int]]] = [[] for _ in engines]
    for _ in range(repetitions):
        whole, short = workload.prompts(vocab_size, rng), workload.prompts(vocab_size, rng)
        for index, engine in enumerate(engines):
            generation = engine.generate(whole, workload.output_lengths)
            tokens[index] = generation.token_ids
            total[index].append(1000 * generation.seconds)
            first[index].append(1000 * engine.generate(short, ones).seconds)
    counts = [differing(each, tokens[-1]) for each in tokens[:-1]]
    return [
        _result(engine.label, workload, to_first, to_last, count)
        for engine, to_first, to_last, count in zip(engines, first, total, [*counts, None], strict=True)
        if not has_failed(engine)
    ]


def _result(
    engine: str, workload: Workload, first: list[float], total: list[float], count: int | None
) -> LatencyResult:
    batch_size, steps = len(workload.prompt_lengths), workload.output_lengths[0] - 1
    best = (min(total) - min(first)) / steps
    each = [(to_last - to_first) / steps for to_first, to_last in zip(first, total, strict=True)]
    return LatencyResult(
        engine=engine,
        batch_size=batch_size,
        prompt_length=workload.prompt_lengths[0],
        output_length=workload.output_lengths[0],
        repetitions=len(total),
        first_token_ms=Spread.of(first),
        token_ms=Spread(best, Spread.of(each).p50, Spread.of(each).p99),
        total_ms=Spread.of(total),
        decode_tokens_per_second=1000 * batch_size / best,
        differing_requests=count,
    )


@dataclass(frozen=True)
class Speedup:
    """How many times as fast the last engine is as the faster of Hugging Face's, else the fastest other, by medians."""

    batch_size: int
    first_token: float
    first_token_of: str
    """The engine that the figure is of."""
    token: float
    token_of: str
    """The engine that the figure is of."""


class LatencyReport(TypedDict):
    """What is written: each engine on each batch size."""

    environment: Environment
    results: list[LatencyResult]
    speedups: list[Speedup]
    not_measured: list[NotMeasured]


def speedups(results: Sequence[LatencyResult]) -> list[Speedup]:
    """One for each batch size; none where there is one engine alone."""
    ratios = []
    for batch_size, group in groupby(results, key=lambda result: result.batch_size):
        *others, last = group
        first_ms = {other.engine: other.first_token_ms.p50 for other in others}
        token_ms = {other.engine: other.token_ms.p50 for other in others}
        first_of, token_of = fastest(first_ms), fastest(token_ms)
        if first_of is not None and token_of is not None:
            to_first, to_next = first_ms[first_of] / last.first_token_ms.p50, token_ms[token_of] / last.token_ms.p50
            ratios.append(Speedup(batch_size, to_first, first_of, to_next, token_of))
    return ratios


def show(results: Sequence[LatencyResult]) -> None:
    """Print a table."""
    head = results[0]
    title = (
        f"{head.prompt_length} tokens in, {head.output_length} out; "
        f"milliseconds, p50 and p99 of {head.repetitions} repetitions"
    )
    columns = ("batch", "engine", "first token", "a token", "all tokens", "tokens/s", "differing requests")
    rows = [
        (
            str(result.batch_size),
            result.engine,
            *(f"{_ms(s.p50)} {_ms(s.p99)}" for s in (result.first_token_ms, result.token_ms, result.total_ms)),
            f"{result.decode_tokens_per_second:.1f}",
            "" if result.differing_requests is None else str(result.differing_requests),
        )
        for result in results
    ]
    rows += [
        (str(s.batch_size), "speedup", f"{s.first_token:.2f} {s.first_token_of}", f"{s.token:.2f} {s.token_of}")
        + ("",) * 3
        for s in speedups(results)
    ]
    print_table(title, columns, rows)


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"
