"""The figures of a load, under the names that the field gives them. Latencies are in milliseconds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypedDict

import numpy as np

from hasten.bench.load.client import Ran
from hasten.bench.load.reply import Record
from hasten.bench.slo import Slo

_MS = 1000.0
_BUSY, _DELAY_SHARE, _LEAST_DELAY_MS = 0.8, 0.1, 2.0
"""From which CPU share on, and from which part of a measured 99th percentile on (if it is more than the resolution of
timers), a client process is taken for the bottleneck."""


@dataclass(frozen=True)
class Latency:
    """A latency over requests, or over the gaps between events, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency | None":
        """Mean and percentiles, interpolated linearly; None of no values."""
        if not len(seconds):
            return None
        values = np.asarray(seconds) * _MS
        return cls(float(values.mean()), *map(float, np.percentile(values, [50, 90, 95, 99])))


@dataclass(frozen=True)
class ClientFigures:
    """How the client processes kept up. Delays are in milliseconds."""

    processes: int
    cpu_share: float
    """CPU seconds per second of the process that needed the most."""
    send_delay: Latency | None
    """From the moment that a request might be sent until it was."""
    loop_lag: Latency | None
    """By which an event loop was late for a timer, and so for an event that arrived then."""
    bottleneck: list[str]
    """Reasons to take the client for a bottleneck; empty where there are none."""


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What one run has measured."""

    request_rate: float | str
    """Of the schedule; `inf` and `trace` are words."""
    max_concurrency: int | None
    requests: int
    completed: int
    failed: int
    errors: dict[str, int]
    """Failed requests by kind."""
    error_messages: dict[str, str]
    """The first message of each kind."""
    duration: float
    """Seconds from the first request's start to the last one's end."""
    request_throughput: float
    """Completed requests per second."""
    output_throughput: float | None
    """Output tokens per second; None where nobody has counted them, here and below."""
    total_token_throughput: float | None
    goodput: float | None
    """Requests per second that met all objectives; None where none were set."""
    input_tokens: int | None
    output_tokens: int | None
    events: int
    events_per_token: float | None
    ttft: Latency | None
    tpot: Latency | None
    itl: Latency | None
    e2el: Latency | None
    ttft_from_schedule: Latency | None
    """The same from the time at which the request was due: it has the waiting for the maximum concurrency in it."""
    e2el_from_schedule: Latency | None
    client: ClientFigures

    def keeps(self, slo: Slo) -> bool:
        """Whether no request failed and the 95th percentile of each limited latency is within its limit."""
        limited = ((getattr(self, name), limit) for name, limit in slo.limits.items())
        return not self.failed and all(latency is not None and latency.p95 <= limit for latency, limit in limited)


class LoadReport(TypedDict):
    """What is written: a server under each rate, and what put it under load."""

    client: dict[str, Any]
    server: dict[str, Any]
    results: list[LoadResult]


def _latencies(record: Record) -> dict[str, float | None]:
    """A completed request's own latencies in milliseconds, from the time at which it was due on."""
    tpot = _tpot(record)
    return {
        "ttft": (record.times[0] - record.due) * _MS,
        "tpot": None if tpot is None else tpot * _MS,
        "e2el": (record.last - record.due) * _MS,
    }


def _tpot(record: Record) -> float | None:
    """Seconds per output token after the first; None of one token, or where all came in one event."""
    if record.output_tokens is None or record.output_tokens < 2 or record.last == record.times[0]:
        return None
    return (record.last - record.times[0]) / (record.output_tokens - 1)


def _gaps(record: Record) -> Sequence[float]:
    return np.diff(np.frombuffer(record.times)).tolist()


def result_of(ran: Sequence[Ran], *, request_rate: float | str, max_concurrency: int | None, slo: Slo) -> LoadResult:
    """The figures of a run in which at least one request was completed; token counts are in the records."""
    records = [record for each in ran for record in each.records]
    done = [record for record in records if not record.error]
    failed = [record for record in records if record.error]
    duration = max(record.end for record in done) - min(record.sent for record in done)
    tokens = _Tokens.of(done)
    events = sum(len(record.times) for record in done)
    ttft = Latency.of([record.times[0] - record.sent for record in done])
    itl = Latency.of(list(chain.from_iterable(map(_gaps, done))))
    return LoadResult(
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        requests=len(records),
        completed=len(done),
        failed=len(failed),
        errors=dict(Counter(record.error for record in failed).most_common()),
        error_messages={record.error: record.message for record in reversed(failed)},
        duration=duration,
        request_throughput=len(done) / duration,
        output_throughput=None if tokens.outputs is None else tokens.outputs / duration,
        total_token_throughput=None if tokens.total is None else tokens.total / duration,
        goodput=_goodput(done, tokens, slo, duration),
        input_tokens=tokens.inputs,
        output_tokens=tokens.outputs,
        events=events,
        events_per_token=events / tokens.outputs if tokens.outputs else None,
        ttft=ttft,
        tpot=Latency.of([tpot for record in done if (tpot := _tpot(record)) is not None]) if tokens.outputs else None,
        itl=itl,
        e2el=Latency.of([record.last - record.sent for record in done]),
        ttft_from_schedule=Latency.of([record.times[0] - record.due for record in done]),
        e2el_from_schedule=Latency.of([record.last - record.due for record in done]),
        client=_client_figures(ran, records, {"ttft": ttft, "itl": itl}),
    )


@dataclass(frozen=True)
class _Tokens:
    """Tokens of completed requests; None where nobody has counted those of one."""

    inputs: int | None
    outputs: int | None

    @classmethod
    def of(cls, records: Sequence[Record]) -> "_Tokens":
        return cls(
            _total([record.input_tokens for record in records]), _total([record.output_tokens for record in records])
        )

    @property
    def total(self) -> int | None:
        return None if self.inputs is None or self.outputs is None else self.inputs + self.outputs


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)


def _goodput(records: Sequence[Record], tokens: _Tokens, slo: Slo, duration: float) -> float | None:
    """Requests per second that met all objectives; None without any, or where one needs tokens that nobody counted."""
    if not slo.limits or ("tpot" in slo.limits and tokens.outputs is None):
        return None
    return sum(slo.met_by_request(_latencies(record)) for record in records) / duration


def _client_figures(
    ran: Sequence[Ran], records: Sequence[Record], measured: Mapping[str, Latency | None]
) -> ClientFigures:
    cpu_share = max(each.cpu_share for each in ran)
    delay = Latency.of([record.sent - record.ready for record in records])
    lag = Latency.of(list(chain.from_iterable(each.lags for each in ran)))
    reasons = [f"a client process needs {cpu_share:.0%} of a CPU: raise --processes"] if cpu_share >= _BUSY else []
    advice = "raise --processes" if cpu_share >= _BUSY / 2 else "the machine leaves the client too little CPU"
    for what, own, name in (("requests were sent", delay, "ttft"), ("events were read", lag, "itl")):
        latency = measured[name]
        if own and latency and own.p99 > max(_LEAST_DELAY_MS, _DELAY_SHARE * latency.p99):
            late = f"{what} up to {own.p99:.1f} ms late (p99)"
            reasons.append(f"{late}, where the {name} is {latency.p99:.1f} ms: {advice}")
    return ClientFigures(len(ran), cpu_share, delay, lag, reasons)
