import pytest
from tests.bench.load.test_metrics import FAILED, FIRST, SECOND, result

from hasten.bench.slo import Slo
from hasten.bench.sweep import Point, knee
from hasten.core.errors import ConfigError


def point(concurrency: int, throughput: float, *records: object) -> Point:
    load = result(*(records or (FIRST, SECOND)))  # type: ignore[arg-type]
    return Point(concurrency, load, throughput, None, None)


def test_an_objective_has_limits_in_milliseconds() -> None:
    slo = Slo.parse("ttft=1.5s, itl=40ms")
    assert slo.limits == {"ttft": 1500, "itl": 40}
    assert Slo.parse(str(slo)) == slo
    for text in ("ttft:1500 itl:40", "ttft:1500, itl=0.04s", " ttft:1.5e3 itl=40ms"):
        assert Slo.parse(text) == slo


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a limit"),
        ("ttft=300", r"'ttft=300' is not a limit of a latency \(ttft, itl, tpot, e2el\); write NAME=TIME"),
        ("ttft:300ms", "'ttft:300ms' is not a limit"),
        ("ttft=nans", "'ttft=nans' is not a limit"),
        ("ttft=300ms,latency=1s", "'latency=1s' is not a limit"),
        ("ttft=0ms", "'ttft=0ms' is not a limit"),
        ("itl=-4ms", "'itl=-4ms' is not a limit"),
        ("itl=4ms,itl=5ms", "limits itl twice"),
    ],
)
def test_bad_objectives(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Slo.parse(text)


def test_an_objective_is_kept_at_the_95th_percentile() -> None:
    load = result(FIRST, SECOND)
    assert load.ttft is not None
    assert load.keeps(Slo({"ttft": load.ttft.p95}))
    assert not load.keeps(Slo({"ttft": load.ttft.p95 * 0.999}))
    assert not result(FIRST, FAILED).keeps(Slo({"ttft": 10_000})), "a failed request keeps no objective"


def test_the_knee_is_the_highest_throughput_that_keeps_the_objective() -> None:
    slow, fast = point(1, 1.0, FIRST), point(2, 1.0, FIRST, SECOND)
    assert knee([slow, fast], Slo({"ttft": 1000})) is max(
        (slow, fast), key=lambda each: each.load.output_throughput or 0.0
    )
    assert knee([slow, fast], Slo({"ttft": 150})) is slow
    assert knee([slow, fast], Slo({"ttft": 1})) is None
