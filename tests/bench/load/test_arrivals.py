import itertools
import math
import random
import statistics
from collections.abc import Iterator

import pytest

from hasten.bench.load.arrivals import AT_ONCE, arrival_times, at_rate, rate_of
from hasten.core.errors import ConfigError


def first(count: int, times: Iterator[float]) -> list[float]:
    return list(itertools.islice(times, count))


def test_poisson_gaps_are_exponential() -> None:
    times = first(20_001, arrival_times(8.0, "poisson", random.Random(0)))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.02)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.02)
    # the largest distance between the distribution function of the gaps and that of Exp(8): Kolmogorov and Smirnov
    steps = [(rank / len(gaps), 1 - math.exp(-8 * gap)) for rank, gap in enumerate(sorted(gaps), start=1)]
    assert max(abs(seen - expected) for seen, expected in steps) < 1.63 / math.sqrt(len(gaps))
    assert times == first(20_001, arrival_times(8.0, "poisson", random.Random(0)))


def test_constant_gaps_are_equal() -> None:
    assert first(4, arrival_times(4.0, "constant", random.Random(0))) == [0, 0.25, 0.5, 0.75]


def test_an_infinite_rate_has_all_at_once() -> None:
    assert first(3, arrival_times(AT_ONCE, "poisson", random.Random(0))) == [0, 0, 0]


def test_a_trace_is_stretched_to_a_rate() -> None:
    assert at_rate([10.0, 10.5, 14.0], 4.0) == [0, 0.0625, 0.5]
    assert at_rate([10.0, 10.5], AT_ONCE) == [0, 0]
    with pytest.raises(ConfigError, match="all have the same timestamp"):
        at_rate([3.0, 3.0], 4.0)


def test_rates_as_text() -> None:
    assert rate_of("2.5") == 2.5
    assert rate_of("inf") == AT_ONCE


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", ""])
def test_no_rates(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a rate: a number of requests per second above 0, or inf"):
        rate_of(text)
