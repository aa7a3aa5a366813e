from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from tests.bench.load.test_metrics import FIRST, result

from hasten.bench.load.metrics import Latency
from hasten.bench.slo import Slo
from hasten.bench.sweep import Point, SweepOptions
from hasten.bench.tune import candidates, search, tune
from hasten.core.errors import EngineError

SLO = Slo({"ttft": 100.0, "itl": 40.0})


class Machine:
    """A server whose first tokens take as many times `step_ms` as requests are in flight, up to `capacity`."""

    def __init__(self, step_ms: float, capacity: int = 10_000, slower_by: float = 1.0) -> None:
        self.step_ms, self.capacity, self.slower_by = step_ms, capacity, slower_by
        self.asked: list[int] = []

    def run(self, concurrency: int, options: SweepOptions = SweepOptions()) -> Point:  # noqa: B008
        self.asked.append(concurrency)
        ttft = self.step_ms * concurrency * self.slower_by
        load = replace(
            result(FIRST),
            ttft=Latency(ttft, ttft, ttft, ttft, ttft),
            itl=Latency(1.0, 1.0, 1.0, 1.0, 1.0),
            output_throughput=float(min(concurrency, self.capacity)),
        )
        return Point(concurrency, load, 1.0, None, None)


@pytest.mark.parametrize("step_ms", [0.9, 2.1, 9.9, 34.0, 100.0])
def test_the_edge_is_found_to_an_eighth(step_ms: float) -> None:
    machine = Machine(step_ms)
    points = search(machine.run, SLO, 256)
    edge = int(100 / step_ms)
    best = max(point.concurrency for point in points if point.load.keeps(SLO))
    assert edge * 7 / 8 - 1 <= best <= edge
    assert len(machine.asked) == len(set(machine.asked)) <= 12
    assert [point.concurrency for point in points] == sorted(machine.asked)


def test_no_more_is_in_flight_than_may_be_or_than_brings_something() -> None:
    assert Machine(0.01).asked == []
    limited, saturated = Machine(0.01), Machine(0.01, capacity=4)
    search(limited.run, SLO, 24)
    search(saturated.run, SLO, 256)
    assert limited.asked == [1, 2, 4, 8, 16, 24]
    assert saturated.asked == [1, 2, 4, 8]


def test_settings_to_search() -> None:
    assert candidates(SLO, {}) == [{}, {"itl_target": 32.0}]
    assert candidates(Slo({"ttft": 5.0}), {}) == [{}, {"itl_target": 0.0}]
    assert candidates(SLO, {"itl_target": 7.0}) == [{}]


def servers(slower_by: float = 1.0) -> tuple[Any, list[dict[str, Any]]]:
    """Servers on which pacing by 32 ms is the best; the confirming one may be slower than those before it."""
    started: list[dict[str, Any]] = []

    @contextmanager
    def start(options: Mapping[str, Any]) -> Iterator[Machine]:
        started.append(dict(options))
        step_ms = 5.0 if options.get("itl_target") else 12.5
        yield Machine(step_ms, slower_by=slower_by if "max_num_seqs" in options else 1.0)

    return start, started


def test_the_best_setting_is_confirmed_on_a_server_limited_to_it() -> None:
    start, started = servers()
    found = tune(start, candidates(SLO, {}), SLO, 256, SweepOptions())
    assert [setting.concurrency for setting in found.settings] == [8, found.options["max_num_seqs"]]
    assert 17 <= found.options["max_num_seqs"] <= 20
    assert found.options["itl_target"] == 32.0
    assert started == [{}, {"itl_target": 32.0}, found.options]
    assert found.point.concurrency == found.options["max_num_seqs"]


def test_what_is_not_kept_again_is_lowered() -> None:
    start, started = servers(slower_by=1.5)
    found = tune(start, candidates(SLO, {}), SLO, 256, SweepOptions())
    assert found.options["max_num_seqs"] == found.point.concurrency < started[-1]["max_num_seqs"]
    assert found.point.load.keeps(SLO)


def test_an_objective_that_cannot_be_kept() -> None:
    start, _ = servers()
    with pytest.raises(EngineError, match=r"nothing keeps ttft=1ms: 1 in flight: .* ttft 12\.5 ms.*raise the limits"):
        tune(start, candidates(SLO, {}), Slo({"ttft": 1.0}), 256, SweepOptions())
    start, _ = servers(slower_by=1000)
    with pytest.raises(EngineError, match="was kept once and not again"):
        tune(start, candidates(SLO, {}), SLO, 256, SweepOptions())
