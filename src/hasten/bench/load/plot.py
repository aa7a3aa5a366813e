"""A picture of a load, as SVG: latencies and throughput over the request rates."""

from collections.abc import Mapping, Sequence

from hasten.bench.charts import Axis, Picture, Series, number, plot, sheet, write_sheet
from hasten.bench.load.metrics import LoadResult
from hasten.bench.load.report import LATENCIES, rate_text

TITLES = {
    "ttft": "time to first token, ms",
    "tpot": "time per output token, ms",
    "itl": "between events, ms",
    "e2el": "whole request, ms",
}

Lines = Mapping[str, Sequence[float | None]]
"""Values at each rate, by the name of the line."""


def write_plot(path: str, title: str, results: Sequence[LoadResult]) -> None:
    """Write the picture; an OSError names the file."""
    write_sheet(path, title, _pictures(results))


def svg(title: str, results: Sequence[LoadResult]) -> str:
    """The picture's text."""
    return sheet(title, _pictures(results))


def _pictures(results: Sequence[LoadResult]) -> list[Picture]:
    rates = [rate_text(result) for result in results]
    panels: list[tuple[str, Lines]] = [(TITLES[name], _percentiles(name, results)) for name in LATENCIES]
    panels.append(("tokens per second", {"output": [result.output_throughput for result in results]}))
    panels.append(("requests per second", _requests(results)))
    return [_panel(name, rates, lines) for name, lines in panels]


def _percentiles(name: str, results: Sequence[LoadResult]) -> Lines:
    latencies = [getattr(result, name) for result in results]
    return {key: [getattr(each, key, None) for each in latencies] for key in ("p50", "p90", "p99")}


def _requests(results: Sequence[LoadResult]) -> Lines:
    lines: dict[str, list[float | None]] = {"completed": [result.request_throughput for result in results]}
    if any(result.goodput is not None for result in results):
        lines["goodput"] = [result.goodput for result in results]
    return lines


def _panel(name: str, rates: Sequence[str], lines: Lines) -> Picture:
    """A diagram with its axes. Rates stand at equal distances, since `inf` is among them."""
    values = [value for each in lines.values() for value in each if value is not None]
    series = []
    for label, heights in lines.items():
        points = [(float(index), value) for index, value in enumerate(heights) if value is not None]
        titles = [f"{label} at {rates[int(index)]}: {number(value)}" for index, value in points]
        series.append(Series(label, points, titles))
    return plot(name, Axis.words("requests per second", rates), Axis.linear("", values), series)
