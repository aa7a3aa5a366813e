"""A picture of a load, as SVG: latencies and throughput over the request rates."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from hasten.bench.load.metrics import LoadResult
from hasten.bench.load.report import LATENCIES, number, rate_text
from hasten.bench.svg import COLORS, TITLE_HEIGHT, document, text
from hasten.core.files import write_text

_WIDTH, _HEIGHT, _COLUMNS = 340, 240, 3
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 34, 16, 40
_LINES = 4
_STEPS = (1, 2, 2.5, 5, 10)
_TITLES = {
    "ttft": "time to first token, ms",
    "tpot": "time per output token, ms",
    "itl": "between events, ms",
    "e2el": "whole request, ms",
}

Series = Mapping[str, Sequence[float | None]]
"""Values at each rate, by the name of the line."""


def write_plot(path: str, title: str, results: Sequence[LoadResult]) -> None:
    """Write the picture; an OSError names the file."""
    write_text(Path(path), svg(title, results))


def svg(title: str, results: Sequence[LoadResult]) -> str:
    """The picture's text."""
    rates = [rate_text(result) for result in results]
    panels = [(_TITLES[name], _percentiles(name, results)) for name in LATENCIES]
    panels.append(("tokens per second", {"output": [result.output_throughput for result in results]}))
    panels.append(("requests per second", _requests(results)))
    rows = -(-len(panels) // _COLUMNS)
    parts = []
    for index, (name, series) in enumerate(panels):
        x, y = index % _COLUMNS * _WIDTH, index // _COLUMNS * _HEIGHT + TITLE_HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_panel(name, rates, series)}</g>')
    return document(_COLUMNS * _WIDTH, rows * _HEIGHT + TITLE_HEIGHT, title, parts)


def _percentiles(name: str, results: Sequence[LoadResult]) -> Series:
    latencies = [getattr(result, name) for result in results]
    return {key: [getattr(each, key, None) for each in latencies] for key in ("p50", "p90", "p99")}


def _requests(results: Sequence[LoadResult]) -> Series:
    series: dict[str, list[float | None]] = {"completed": [result.request_throughput for result in results]}
    if any(result.goodput is not None for result in results):
        series["goodput"] = [result.goodput for result in results]
    return series


def _panel(name: str, rates: Sequence[str], series: Series) -> str:
    """A diagram with its axes. Rates stand at equal distances, since `inf` is among them."""
    top = _ceiling(max((value for values in series.values() for value in values if value is not None), default=0.0))
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step = across / max(1, len(rates) - 1)

    def x(index: int) -> float:
        return _LEFT + (index * step if len(rates) > 1 else across / 2)

    def y(value: float) -> float:
        return _TOP + down * (1 - value / top)

    parts = [text(_LEFT, _TOP - 18, name, size=12)]
    for line in range(_LINES + 1):
        value = top * line / _LINES
        parts.append(f'<path d="M{_LEFT} {y(value):.1f}h{across}" stroke="#ddd"/>')
        parts.append(text(_LEFT - 6, y(value) + 4, number(value), anchor="end"))
    parts += [text(x(index), _HEIGHT - _BOTTOM + 16, rate, anchor="middle") for index, rate in enumerate(rates)]
    parts.append(text(_LEFT + across / 2, _HEIGHT - 8, "requests per second", anchor="middle"))
    for color, (label, values) in zip(COLORS, series.items(), strict=False):
        parts.append(_line(color, label, rates, values, x, y))
    parts += _legend(series)
    return "".join(parts)


def _line(
    color: str,
    label: str,
    rates: Sequence[str],
    values: Sequence[float | None],
    x: Callable[[int], float],
    y: Callable[[float], float],
) -> str:
    """A line through the values, with a dot at each that says its figure where the pointer rests on it."""
    points = [(index, value) for index, value in enumerate(values) if value is not None]
    path = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in points)
    dots = [
        f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="3" fill="{color}">'
        f"<title>{escape(f'{label} at {rates[index]}: {number(value)}')}</title></circle>"
        for index, value in points
    ]
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>' + "".join(dots)


def _legend(series: Series) -> list[str]:
    if len(series) < 2:
        return []
    parts, at = [], float(_WIDTH - _RIGHT)
    for color, label in reversed(list(zip(COLORS, series, strict=False))):
        parts.append(text(at, _TOP - 18, label, anchor="end", color=color))
        at -= 7 * len(label) + 8
    return parts


def _ceiling(value: float) -> float:
    """The end of an axis: a round number that is not below the largest value."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** (len(str(int(value))) - 1) if value >= 1 else 10.0**-4
    while power * 10 < value:
        power *= 10
    return next(step * power for step in _STEPS if step * power >= value)
