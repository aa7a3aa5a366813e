import random
import statistics

import pytest

from hasten.bench.load.lengths import Lengths
from hasten.core.errors import ConfigError


def drawn(text: str, count: int = 4000) -> list[int]:
    rng, lengths = random.Random(0), Lengths.parse(text)
    return [lengths.draw(rng) for _ in range(count)]


def test_fixed() -> None:
    assert set(drawn("128")) == {128}


def test_a_range_has_both_its_ends() -> None:
    assert set(drawn("3:6")) == {3, 4, 5, 6}
    assert statistics.mean(drawn("100:300")) == pytest.approx(200, rel=0.02)


def test_lognormal_has_its_mean_and_deviation() -> None:
    lengths = drawn("lognormal:400,200", 20_000)
    assert statistics.mean(lengths) == pytest.approx(400, rel=0.02)
    assert statistics.stdev(lengths) == pytest.approx(200, rel=0.04)
    assert statistics.median(lengths) < 380
    assert max(drawn("lognormal:400,200,500")) == 500
    assert min(drawn("lognormal:1,30")) == 1


@pytest.mark.parametrize(
    "text", ["0", "-3", "5:3", "0:3", "lognormal:5", "lognormal:0,1", "lognormal:9,1,0", "12.5", "many", ""]
)
def test_no_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a length in tokens: give N, LOW:HIGH, or lognormal:MEAN,STDDEV"):
        Lengths.parse(text)
