import math
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hasten.bench.load.client import Ran
from hasten.bench.load.metrics import Latency, LoadResult, result_of
from hasten.bench.load.reply import Record
from hasten.bench.slo import REQUEST_NAMES, Slo
from hasten.core.errors import ConfigError


def answered(due: float, times: list[float], *, sent: float | None = None, **more: Any) -> Record:
    sent = due if sent is None else sent
    record = Record(due, ready=sent, sent=sent, times=array("d", times), last=times[-1], end=times[-1] + 0.001)
    return replace(record, **{"input_tokens": 10, "output_tokens": len(times), **more})


def result(*records: Record, slo: Slo | None = None, **ran: Any) -> LoadResult:
    return result_of([Ran(list(records), **ran)], request_rate=4.0, max_concurrency=None, slo=slo or Slo())


FIRST = answered(100.0, [100.1, 100.15, 100.25])
SECOND = answered(100.5, [100.8, 100.9], output_tokens=4)
FAILED = replace(answered(100.7, [0.0]), error="HTTP 503", message="full")


def test_latencies_and_rates() -> None:
    found = result(FIRST, FAILED, SECOND)
    assert (found.requests, found.completed, found.failed) == (3, 2, 1)
    assert found.errors == {"HTTP 503": 1}
    assert found.error_messages == {"HTTP 503": "full"}
    assert found.duration == pytest.approx(0.901)
    assert found.request_throughput == pytest.approx(2 / 0.901)
    assert (found.input_tokens, found.output_tokens, found.events) == (20, 7, 5)
    assert found.output_throughput == pytest.approx(7 / 0.901)
    assert found.total_token_throughput == pytest.approx(27 / 0.901)
    assert found.events_per_token == 5 / 7
    assert found.goodput is None
    assert found.ttft is not None
    assert [found.ttft.mean, found.ttft.p50] == pytest.approx([200, 200])
    assert found.tpot is not None  # of the first request 150 ms for 2 tokens, of the second 100 ms for 3
    assert found.tpot.mean == pytest.approx((75 + 100 / 3) / 2)
    assert found.itl is not None
    assert found.itl.mean == pytest.approx((50 + 100 + 100) / 3)
    assert found.e2el is not None
    assert found.e2el.mean == pytest.approx((250 + 400) / 2)


def test_percentiles_are_interpolated() -> None:
    values = [n / 1000 for n in range(1, 101)]
    found = Latency.of(values)
    assert found is not None
    assert [found.mean, found.p50] == pytest.approx([50.5, 50.5])
    expected = np.percentile(np.array(values) * 1000, [90, 95, 99])
    assert [found.p90, found.p95, found.p99] == pytest.approx(expected.tolist())
    assert Latency.of([]) is None


def test_waiting_in_the_client_counts_from_the_schedule() -> None:
    found = result(replace(FIRST, due=99.0, ready=100.0), slo=Slo({"ttft": 200}))
    assert found.ttft is not None
    assert found.ttft_from_schedule is not None
    assert [found.ttft.p50, found.ttft_from_schedule.p50] == pytest.approx([100, 1100])
    assert found.e2el_from_schedule is not None
    assert found.e2el_from_schedule.p50 == pytest.approx(1250)
    assert found.goodput == 0, "who waits for a place does not get a token in time"


@pytest.mark.parametrize(
    ("texts", "good"),
    [
        (["ttft:200"], 1),
        (["ttft:301"], 2),
        (["tpot:50"], 1),
        (["ttft:200", "tpot:50"], 0),
        (["e2el:300"], 1),
        (["ttft:101", "tpot:76", "e2el:251"], 1),
    ],
)
def test_goodput(texts: list[str], good: int) -> None:
    found = result(FIRST, SECOND, FAILED, slo=Slo.parse(" ".join(texts), REQUEST_NAMES))
    assert found.goodput == pytest.approx(good / found.duration)


def test_one_token_has_no_time_per_token() -> None:
    found = result(answered(1.0, [1.1]), slo=Slo({"tpot": 1}))
    assert (found.tpot, found.itl) == (None, None)
    assert found.goodput == pytest.approx(1 / found.duration)


def test_tokens_of_a_single_event_have_no_time_each() -> None:
    joined = answered(1.0, [1.5], output_tokens=32)
    assert result(joined).tpot is None
    found = result(joined, FIRST).tpot
    assert found is not None
    assert found.mean == pytest.approx(75)


def test_uncounted_tokens_are_not_guessed() -> None:
    found = result(FIRST, replace(SECOND, output_tokens=None), slo=Slo({"tpot": 1}))
    assert found.output_tokens is None
    assert [found.output_throughput, found.tpot, found.goodput, found.events_per_token] == [None] * 4
    assert result(replace(FIRST, input_tokens=None)).total_token_throughput is None


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:0", "ttft:x", "ttft:inf", "itl:5", ":5"])
def test_bad_objectives(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not a limit of a latency \(ttft, tpot, e2el\); write .*NAME:MILLISEC"):
        Slo.parse(text, REQUEST_NAMES)
    with pytest.raises(ConfigError, match="limits ttft twice"):
        Slo.parse("ttft:5 ttft:6", REQUEST_NAMES)


def test_a_client_that_keeps_up_is_no_bottleneck() -> None:
    found = result(FIRST, SECOND, lags=array("d", [0.0001] * 99), cpu_share=0.3)
    assert found.client.bottleneck == []
    assert (found.client.processes, found.client.cpu_share) == (1, 0.3)
    assert found.client.send_delay is not None
    assert found.client.send_delay.p99 == 0


def test_a_busy_client_is_named() -> None:
    (reason,) = result(FIRST, cpu_share=0.97).client.bottleneck
    assert reason == "a client process needs 97% of a CPU: raise --processes"


def test_requests_that_are_sent_late_are_named() -> None:
    late = [replace(FIRST, ready=100.0, sent=100.02) for _ in range(20)]
    (reason,) = result(*late).client.bottleneck
    late_by = "requests were sent up to 20.0 ms late (p99), where the ttft is 80.0 ms"
    assert reason == f"{late_by}: the machine leaves the client too little CPU"
    waited = replace(FIRST, due=90.0, ready=100.0, sent=100.0)
    assert result(waited).client.bottleneck == [], "a maximum concurrency is no fault of the client"


def test_a_slow_loop_is_named() -> None:
    lags = array("d", [0.04] * 100)
    (reason,) = result(FIRST, lags=lags, cpu_share=0.5).client.bottleneck
    assert reason.startswith("events were read up to 40.0 ms late (p99), where the itl is")
    assert reason.endswith("raise --processes")


def test_a_delay_within_the_resolution_of_timers_is_none() -> None:
    fast = answered(1.0, [1.001, 1.002])
    assert result(fast, lags=array("d", [0.0015])).client.bottleneck == []
    assert not math.isnan(result(fast).request_throughput)
