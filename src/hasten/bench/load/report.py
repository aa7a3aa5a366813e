"""The figures of a load as tables that fit a terminal."""

from collections.abc import Sequence

from hasten.bench.charts import number
from hasten.bench.load.metrics import LoadResult
from hasten.bench.report import print_table

LATENCIES = ("ttft", "tpot", "itl", "e2el")
_PERCENTILES = ("mean", "p50", "p90", "p95", "p99")
_DIFFERS = 1.05
"""From which ratio on a latency from the schedule has a row of its own."""


_FEW_EVENTS = 0.5
"""Per token; fewer need an explanation."""
_WHY_FEW_EVENTS = (
    "the server joins tokens, or they have no text (--no-skip-special-tokens shows end tokens, which --ignore-eos may "
    "bring)"
)


def show(title: str, results: Sequence[LoadResult]) -> None:
    """Print throughput and latencies of each run."""
    columns = ("rate", "ok", "failed", "req/s", "output tok/s", "goodput", "events/tok")
    print_table(title, columns, [_throughput(result) for result in results])
    rows = [row for result in results for row in _latencies(result)]
    print_table("latencies, ms", ("rate", "what", *_PERCENTILES), rows)


def _throughput(result: LoadResult) -> tuple[str, ...]:
    return (
        rate_text(result),
        str(result.completed),
        str(result.failed),
        number(result.request_throughput),
        number(result.output_throughput),
        number(result.goodput),
        number(result.events_per_token),
    )


def _latencies(result: LoadResult) -> list[tuple[str, ...]]:
    rows = []
    for name in LATENCIES:
        latency, due = getattr(result, name), getattr(result, f"{name}_from_schedule", None)
        rows.append((rate_text(result), name, *(number(getattr(latency, key, None)) for key in _PERCENTILES)))
        if due is not None and latency is not None and due.p99 > _DIFFERS * latency.p99:
            rows.append((rate_text(result), f"{name}, from schedule", *(number(getattr(due, k)) for k in _PERCENTILES)))
    return rows


def notes(results: Sequence[LoadResult]) -> list[str]:
    """What a reader of the tables has to know: failures, uncounted tokens, a client that did not keep up."""
    lines = []
    for result in results:
        where = f"rate {rate_text(result)}"
        for kind, count in result.errors.items():
            lines.append(f"{where}: {count} of {result.requests} failed with {kind}: {result.error_messages[kind]}")
        if result.output_tokens is None:
            lines.append(f"{where}: the server does not count its tokens; give --tokenizer for tpot and tokens/s")
        if result.events_per_token is not None and result.events_per_token < _FEW_EVENTS:
            lines.append(f"{where}: {number(result.events_per_token)} events per token: {_WHY_FEW_EVENTS}")
        lines += [f"{where}: the client is a bottleneck: {reason}" for reason in result.client.bottleneck]
    if not any(result.client.bottleneck for result in results):
        lines.append(f"the client kept up: {_kept_up(results)}")
    return lines


def _kept_up(results: Sequence[LoadResult]) -> str:
    clients = [result.client for result in results]
    busiest = max(client.cpu_share for client in clients)
    delays = [client.send_delay.p99 for client in clients if client.send_delay is not None]
    lags = [client.loop_lag.p99 for client in clients if client.loop_lag is not None]
    count = clients[0].processes
    return (
        f"{count} process{'es' * (count > 1)}, at most {busiest:.0%} of a CPU each, requests sent at most "
        f"{max(delays, default=0.0):.1f} ms late (p99), events read at most {max(lags, default=0.0):.1f} ms late (p99)"
    )


def rate_text(result: LoadResult) -> str:
    """A run's request rate."""
    return result.request_rate if isinstance(result.request_rate, str) else f"{result.request_rate:g}"
