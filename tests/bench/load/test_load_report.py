import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.bench.load.test_metrics import FAILED, FIRST, SECOND, result

from hasten.bench.charts import ceiling, number
from hasten.bench.load.metrics import LoadResult
from hasten.bench.load.plot import svg, write_plot
from hasten.bench.load.report import notes, show
from hasten.bench.slo import Slo

SVG = "{http://www.w3.org/2000/svg}"


def results() -> list[LoadResult]:
    first = result(FIRST, SECOND, FAILED, slo=Slo({"ttft": 200}), cpu_share=0.2)
    return [first, replace(first, request_rate="inf", failed=0, errors={}, goodput=2.0)]


@pytest.mark.parametrize("width", [80, 40])
def test_tables_fit_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    show("openai at http://host:80, model m", results())
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    assert "ttft" in words
    if width == 80:
        assert "4 2 1 2.22 7.77 1.11 0.714" in words
        assert "4 ttft 200 200 280 290 298" in words
        assert "inf 2 0 2.22 7.77 2 0.714" in words


def test_latencies_from_the_schedule_are_shown_where_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    show("title", results())
    assert "from schedule" not in capsys.readouterr().out
    show("title", [result(replace(FIRST, due=99.0, ready=100.0))])
    out = capsys.readouterr().out
    assert "ttft, from schedule" in out
    assert "e2el, from schedule" in out


def test_notes() -> None:
    lines = notes(results())
    assert lines[0] == "rate 4: 1 of 3 failed with HTTP 503: full"
    assert lines[1].startswith("the client kept up: 1 process, at most 20% of a CPU each, requests sent at most 0.0 ms")
    slow = result(replace(FIRST, output_tokens=None), cpu_share=0.9)
    assert notes([slow]) == [
        "rate 4: the server does not count its tokens; give --tokenizer for tpot and tokens/s",
        "rate 4: the client is a bottleneck: a client process needs 90% of a CPU: raise --processes",
    ]


def test_tokens_without_events_are_explained() -> None:
    line = notes([result(replace(FIRST, output_tokens=32))])[0]
    assert line.startswith("rate 4: 0.0938 events per token: the server joins tokens, or they have no text")


def test_the_picture_has_each_figure(tmp_path: Path) -> None:
    write_plot(str(tmp_path / "load.svg"), "model <m> & more", results())
    root = ElementTree.parse(tmp_path / "load.svg").getroot()
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert texts[0] == "model <m> & more"
    assert {"time to first token, ms", "time per output token, ms", "between events, ms", "whole request, ms"} <= set(
        texts
    )
    titles = [each.text for each in root.iter(f"{SVG}title")]
    assert "p99 at 4: 298" in titles
    assert "goodput at inf: 2" in titles
    assert "output at 4: 7.77" in titles
    assert len(titles) == 2 * (4 * 3 + 1 + 2)
    circles = [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in root.iter(f"{SVG}circle")]
    assert all(0 <= x <= 340 and 0 <= y <= 240 for x, y in circles)


def test_a_higher_value_stands_higher() -> None:
    faster = replace(results()[0], request_rate=8.0, ttft=replace(results()[0].ttft, p50=10.0))  # type: ignore[type-var]
    root = ElementTree.fromstring(svg("title", [results()[0], faster]))
    first, second = list(root.iter(f"{SVG}circle"))[:2]
    assert float(first.attrib["cy"]) < float(second.attrib["cy"])
    assert float(first.attrib["cx"]) < float(second.attrib["cx"])


def test_a_picture_of_one_run_without_tokens() -> None:
    single = result(replace(FIRST, output_tokens=None))
    assert ElementTree.fromstring(svg("title", [single])).tag == f"{SVG}svg"


@pytest.mark.parametrize(
    ("value", "end"), [(0, 1), (0.0003, 0.00032), (0.7, 0.8), (1, 1), (3, 3.2), (99, 100), (101, 120), (2400, 2400)]
)
def test_axes_end_at_round_numbers(value: float, end: float) -> None:
    assert ceiling(value) == pytest.approx(end)


def test_numbers() -> None:
    assert [number(value) for value in (None, 0.0, 1.23456, 12.345, 123.4, 12345.6)] == [
        *("-", "0", "1.23", "12.3", "123", "12346"),
    ]
