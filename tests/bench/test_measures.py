import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hasten.bench import latency, report, throughput
from hasten.bench.engines import Generation
from hasten.bench.workloads import Workload, fixed, mixed
from hasten.core.errors import ConfigError


@dataclass
class Clock:
    """Takes a second to the first token of a batch, and a fixed time for each further one."""

    label: str
    step: float
    calls: list[tuple[int, int]] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        self.calls.append((len(prompts), max(lengths)))
        return Generation([[0] * n for n in lengths], 1 + self.step * (max(lengths) - 1))


ROWS = [("lat_b1", "hasten", "1.234", "0.05", ""), ("lat_b1", "HF", "12.34", "0.5", "17")]
COLUMNS = ("workload", "engine", "seconds", "first token s", "requests/s")


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int) -> list[str]:
    """What a table is on a terminal of that width."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    report.print_table("bloom: ready after 1.0 s", COLUMNS, ROWS)
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_table_on_a_wide_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(monkeypatch, capsys, 80)
    assert lines[2].split() == ["workload", "engine", "seconds", "first", "token", "s", "requests/s"]
    assert [line.split() for line in lines[4:6]] == [["lat_b1", "hasten", "1.234", "0.05"], [*ROWS[1]]]


@pytest.mark.parametrize("width", [50, 30])
def test_a_table_on_a_narrow_terminal_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    lines = printed(monkeypatch, capsys, width)
    assert all(len(line) <= width for line in lines)
    assert lines[1:7] == [
        *("", "lat_b1"),
        *("  engine         hasten", "  seconds        1.234", "  first token s  0.05"),
        "",
    ]
    assert lines[7:] == [
        "lat_b1",
        *("  engine         HF", "  seconds        12.34", "  first token s  0.5", "  requests/s     17"),
    ]


def test_a_number_above_figures_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "12")
    report.print_table("load", ("rate", "requests/s"), [("2.5", "2"), ("inf", "9")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["load", "", "rate 2.5", "  requests/s", "2", "", "rate inf", "  requests/s", "9"]


def test_latency_tells_the_first_token_from_the_others() -> None:
    slow, fast = Clock("slow", 0.5), Clock("fast", 0.125)
    first, second = latency.measure([slow, fast], fixed(4, 16, 9), 1000, repetitions=3)
    assert (first.engine, second.engine) == ("slow", "fast")
    assert (first.first_token_ms.p50, first.token_ms.p50, first.total_ms.p99) == (1000, 500, 5000)
    assert second.token_ms == report.Spread(125, 125, 125)
    assert second.decode_tokens_per_second == 4 / 0.125
    assert slow.calls == [(4, 9)] + [(4, 9), (4, 1)] * 3
    assert latency.speedups([first, second]) == [latency.Speedup(4, 1.0, "slow", 4.0, "slow")]
    assert latency.speedups([first]) == []


def test_throughput_rates_come_from_the_median() -> None:
    engine = Clock("engine", 0.5)
    workload = Workload("two", (10, 20), (3, 5))
    (result,) = throughput.measure([engine], workload, 1000, repetitions=3)
    assert result.seconds == [3.0, 3.0, 3.0]
    assert (result.prompt_tokens, result.output_tokens) == (30, 8)
    assert result.output_tokens_per_second == pytest.approx(8 / 3)
    assert result.total_tokens_per_second == pytest.approx(38 / 3)
    assert throughput.speedup([result]) == (None, None)


def test_speedup_is_of_the_last_engine() -> None:
    results = throughput.measure([Clock("slow", 1.0), Clock("fast", 0.0)], mixed(4), 1000)
    ratio = results[0].median_seconds / results[1].median_seconds
    assert ratio > 1
    assert throughput.speedup(results) == (ratio, "slow")


def test_bad_counts() -> None:
    engine = Clock("engine", 0.5)
    with pytest.raises(ConfigError, match="output length of at least 2"):
        latency.measure([engine], fixed(1, 8, 1), 1000, repetitions=1)
    with pytest.raises(ConfigError, match="repetitions must be at least 1"):
        throughput.measure([engine], mixed(2), 1000, repetitions=0)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    engines = [Clock("HF", 0.5), Clock("hasten", 0.25)]
    latency.show(latency.measure(engines, fixed(4, 16, 9), 1000, repetitions=3))
    throughput.show(throughput.measure(engines, mixed(4), 1000))
    out = capsys.readouterr().out
    assert "1000.0 1000.0" in out
    assert "speedup" in out
    assert "times" in out


def test_reports_are_plain_json(tmp_path: Path) -> None:
    fields = {
        "environment": report.environment(torch.device("cpu"), torch.bfloat16),
        "results": [report.Spread(1, 2, 3)],
    }
    report.write_json(str(tmp_path / "report.json"), fields)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["results"] == [{"best": 1, "p50": 2, "p99": 3}]
    assert read["environment"]["dtype"] == "bfloat16"
    assert read["environment"]["device"].startswith("CPU")


def test_spread() -> None:
    spread = report.Spread.of([3.0, 1.0, 2.0])
    assert (spread.best, spread.p50) == (1.0, 2.0)
    assert 2.9 < spread.p99 < 3.0
    rates = report.Spread.of([3.0, 1.0, 2.0], lambda seconds: 6 / seconds)
    assert (rates.best, rates.p50) == (6.0, 3.0)  # the best of rates is the greatest
    assert 2.0 < rates.p99 < 2.1


def test_results_that_cannot_be_written_are_refused_beforehand(tmp_path: Path) -> None:
    report.require_writable(None)
    report.require_writable(str(tmp_path / "new.json"))
    missing = tmp_path / "missing"
    for path, why in ((tmp_path, "it is a folder; give a file"), (missing / "x.json", f"there is no folder {missing}")):
        with pytest.raises(ConfigError, match=f"cannot write the results to {path}: {why}"):
            report.require_writable(str(path))
    with pytest.raises(ConfigError, match="cannot write the results"):
        report.write_json(str(tmp_path), {})
