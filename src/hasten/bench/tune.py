"""The options of a server that keeps a service-level objective at the highest throughput."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from hasten.bench.slo import Slo
from hasten.bench.sweep import Point, SweepOptions, knee
from hasten.core.errors import EngineError

_TARGET_SHARE = 0.8
"""Of the limit between tokens, that steps with prompts are paced to; the rest is for the server and the client."""
_GAIN = 1.03
"""Of the throughput, below which twice as many requests in flight bring nothing."""
_FINENESS = 8
"""The knee is searched to an eighth of its concurrency."""
_LOWER = 0.75
"""Of a concurrency, that is tried where it does not keep the objective again."""


class Measured(Protocol):
    """A server that can be measured."""

    def run(self, concurrency: int, options: SweepOptions) -> Point:
        """Measure with this number of requests in flight."""


Start = Callable[[Mapping[str, Any]], AbstractContextManager[Measured]]
"""Starts a server with engine options on top of the user's."""


@dataclass(frozen=True)
class Setting:
    """A setting of the server, and what was measured with it."""

    options: dict[str, Any]
    """Engine options on top of the user's."""
    points: list[Point]
    """By concurrency."""
    concurrency: int | None
    """Of the knee; None where none keeps the objective."""


@dataclass(frozen=True)
class Tuned:
    """The options that were found, and how the server was with them."""

    options: dict[str, Any]
    """Engine options on top of the user's."""
    point: Point
    """Measured on a server with these options."""
    settings: list[Setting]


class TuneReport(TypedDict):
    """What is written."""

    model: str
    slo: str
    command: str
    """That serves the model with the options that were found."""
    tuned: Tuned


def candidates(slo: Slo, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings to search: the server's own pacing, and that of the objective; what the user gives alone if anything."""
    if "itl_target" in given:
        return [{}]
    limit = min((slo.limits[name] for name in ("itl", "tpot") if name in slo.limits), default=0.0)
    return [{}, {"itl_target": round(_TARGET_SHARE * limit, 1)}]


def tune(
    start: Start,
    settings: Sequence[Mapping[str, Any]],
    slo: Slo,
    most: int,
    options: SweepOptions,
    say: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Search the knee of each setting up to `most` requests in flight, and confirm the best on a server limited to it.

    EngineError where no setting keeps the objective with a single request in flight.
    """
    searched = [_searched(start, setting, slo, most, options, say) for setting in settings]
    best = max(searched, key=_throughput)
    if best.concurrency is None:
        raise EngineError(
            f"nothing keeps {slo}: {_alone(searched)}; raise the limits, or use smaller or faster weights"
        )
    concurrency = best.concurrency
    found = {**best.options, "max_num_seqs": concurrency}
    with start(found) as server:
        point = _confirmed(server, concurrency, slo, options, say)
    return Tuned({**found, "max_num_seqs": point.concurrency}, point, searched)


def _searched(
    start: Start,
    setting: Mapping[str, Any],
    slo: Slo,
    most: int,
    options: SweepOptions,
    say: Callable[[str], None],
) -> Setting:
    label = ", ".join(f"{name} {value}" for name, value in setting.items()) or "the server's defaults"
    say(f"a server with {label}")

    def run(concurrency: int) -> Point:
        point = server.run(concurrency, options)
        say(f"{described(point)}: {'kept' if point.load.keeps(slo) else 'not kept'}")
        return point

    with start(setting) as server:
        points = search(run, slo, most)
    found = knee(points, slo)
    return Setting(dict(setting), points, None if found is None else found.concurrency)


def search(run: Callable[[int], Point], slo: Slo, most: int) -> list[Point]:
    """Points by concurrency: doubled until the objective is missed or nothing is gained, then towards the edge."""
    points: dict[int, Point] = {}

    def kept(concurrency: int) -> bool:
        points[concurrency] = run(concurrency)
        return points[concurrency].load.keeps(slo)

    good, bad, at, best = 0, None, 1, 0.0
    while bad is None:
        if not kept(at):
            bad = at
            break
        throughput = points[at].load.output_throughput or 0.0
        good = at
        if at == most or throughput < best * _GAIN:
            break
        best, at = max(best, throughput), min(2 * at, most)
    while bad is not None and bad - good > max(1, good // _FINENESS):
        middle = (good + bad) // 2
        if kept(middle):
            good = middle
        else:
            bad = middle
    return [points[concurrency] for concurrency in sorted(points)]


def _confirmed(
    server: Measured, concurrency: int, slo: Slo, options: SweepOptions, say: Callable[[str], None]
) -> Point:
    """The point at the concurrency, or at the next lower one that keeps the objective."""
    while True:
        say(f"confirming {concurrency} in flight")
        point = server.run(concurrency, options)
        if point.load.keeps(slo):
            return point
        if concurrency == 1:
            raise EngineError(f"{slo} was kept once and not again: {described(point)}; the machine may be too busy")
        concurrency = max(1, int(concurrency * _LOWER))


def _throughput(setting: Setting) -> float:
    """Of the knee."""
    at_knee = (point for point in setting.points if point.concurrency == setting.concurrency)
    return max((point.load.output_throughput or 0.0 for point in at_knee), default=0.0)


def _alone(searched: Sequence[Setting]) -> str:
    return "; ".join(described(setting.points[0]) for setting in searched)


def described(point: Point) -> str:
    """A point in words."""
    load = point.load
    latencies = [(name, getattr(load, name)) for name in ("ttft", "itl")]
    tails = ", ".join(f"{name} {latency.p95:.1f} ms" for name, latency in latencies if latency is not None)
    rate = "" if load.output_throughput is None else f"{load.output_throughput:.0f} output tokens/s, "
    failed = f", {load.failed} failed" if load.failed else ""
    return f"{point.concurrency} in flight: {rate}p95 {tails}{failed}"
