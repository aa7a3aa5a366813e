"""Charts of benchmarks: lines over an axis, horizontal bars with error bars, and bars of parts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hasten.bench import svg
from hasten.bench.png import is_png, write_png
from hasten.bench.svg import COLORS, SOFT, TITLE_HEIGHT, text
from hasten.core.files import write_text

WIDTH, HEIGHT = 340, 240
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 34, 16, 40
_LINES = 4
_STEPS = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10)
"""Ends of axes, whose quarters are short numbers."""
_ABOUT_HEIGHT = 24
_LEAST_NAME_WIDTH, _VALUE_WIDTH, _ROW, _HEAD = 60, 66, 26, 28
_LETTER = 6.2
"""Width of a letter of the font's usual size."""


@dataclass(frozen=True)
class Picture:
    """The body of a picture in SVG, and its size."""

    title: str
    body: str
    width: int = WIDTH
    height: int = HEIGHT

    def inline(self) -> str:
        """The picture inside a page."""
        return svg.inline(self.width, self.height, self.title, self.body)


def sheet(title: str, pictures: Sequence[Picture], columns: int = 3, about: str = "") -> str:
    """A document of several pictures, row by row; `about` is a smaller line below the title."""
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    parts, y = [], TITLE_HEIGHT
    if about:
        parts.append(text(12, y + 6, about, color=SOFT))
        y += _ABOUT_HEIGHT
    for row in rows:
        parts += [svg.moved(index * WIDTH, y, picture.body) for index, picture in enumerate(row)]
        y += max(picture.height for picture in row)
    return svg.document(min(columns, len(pictures)) * WIDTH, y + 8, title, parts)


def write_sheet(path: str, title: str, pictures: Sequence[Picture], columns: int = 3) -> None:
    """Write a document of several pictures, a PNG where the file is called so; an OSError names it."""
    document = sheet(title, pictures, columns)
    if is_png(path):
        write_png(Path(path), document)
    else:
        write_text(Path(path), document)


def number(value: float | None) -> str:
    """A figure with three digits, or all of those before its point; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Axis:
    """From values to positions between 0 and 1, with the ticks to draw."""

    label: str
    at: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]
    """Values, and what to write at them."""

    @classmethod
    def linear(cls, label: str, values: Sequence[float]) -> "Axis":
        """From 0 to a round number that is not below the largest value."""
        top = ceiling(max(values, default=0.0))
        ticks = [top * step / _LINES for step in range(_LINES + 1)]
        return cls(label, lambda value: value / top, [(tick, number(tick)) for tick in ticks])

    @classmethod
    def log(cls, label: str, values: Sequence[float], base: int = 10) -> "Axis":
        """Logarithmic, between powers of a base, for positive values."""
        low = math.floor(math.log(min(values), base) + 1e-9)
        high = max(low + 1, math.ceil(math.log(max(values), base) - 1e-9))
        step = -(-(high - low) // 6)
        ticks = [float(base) ** power for power in range(low, high + 1, step)]
        return cls(
            label,
            lambda value: (math.log(value, base) - low) / (high - low),
            [(tick, number(tick)) for tick in ticks],
        )

    @classmethod
    def words(cls, label: str, names: Sequence[str]) -> "Axis":
        """Names at equal distances; a value is the index of its name."""
        last = len(names) - 1
        return cls(label, lambda value: value / last if last else 0.5, [(i, name) for i, name in enumerate(names)])


def ceiling(value: float) -> float:
    """The end of an axis: a round number that is not below the largest value."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** (len(str(int(value))) - 1) if value >= 1 else 10.0**-4
    while power * 10 < value:
        power *= 10
    return next(step * power for step in _STEPS if step * power >= value * (1 - 1e-9))


@dataclass(frozen=True)
class Series:
    """Points that belong together."""

    label: str
    points: Sequence[tuple[float, float]]
    titles: Sequence[str] = ()
    """What each point shows where the pointer rests on it."""
    names: Sequence[str] = ()
    """What is written next to each point."""
    color: str = ""
    """Default: that of its position among the series."""
    joined: bool = True
    """Whether a line joins the points."""
    dots: bool = True
    dash: str = ""
    marked: Sequence[int] = field(default=())
    """Indices of points to mark by a circle around them."""


def plot(title: str, x: Axis, y: Axis, series: Sequence[Series], limits: Sequence[tuple[float, str]] = ()) -> Picture:
    """Series in a diagram; `limits` are values of y that a dashed line with words shows."""
    across, down = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def to(px: float, py: float) -> tuple[float, float]:
        return _LEFT + across * x.at(px), _TOP + down * (1 - y.at(py))

    parts = [text(_LEFT - 40, _TOP - 18, title, size=12)]
    for value, words in y.ticks:
        level = _TOP + down * (1 - y.at(value))
        parts.append(svg.line(_LEFT, level, _LEFT + across, level))
        parts.append(text(_LEFT - 6, level + 4, words, anchor="end", color=SOFT))
    for value, words in x.ticks:
        parts.append(text(_LEFT + across * x.at(value), HEIGHT - _BOTTOM + 16, words, anchor="middle", color=SOFT))
    parts.append(text(_LEFT + across / 2, HEIGHT - 8, x.label, anchor="middle", color=SOFT))
    for value, words in limits:
        if 0 <= y.at(value) <= 1:
            level = _TOP + down * (1 - y.at(value))
            parts.append(svg.line(_LEFT, level, _LEFT + across, level, color=SOFT, dash="4 3"))
            parts.append(text(_LEFT + 4, level - 4, words, color=SOFT, size=10))
    colored = [(each.color or COLORS[index % len(COLORS)], each) for index, each in enumerate(series)]
    parts += [_drawn(color, each, [to(*point) for point in each.points]) for color, each in colored]
    parts += _legend([(color, each.label) for color, each in colored if each.label])
    return Picture(title, "".join(parts))


def _drawn(color: str, series: Series, points: Sequence[tuple[float, float]]) -> str:
    parts = []
    if series.joined and len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = f' stroke-dasharray="{series.dash}"' if series.dash else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>')
    if series.dots:
        titles = series.titles or [series.label] * len(points)
        for index, ((x, y), words) in enumerate(zip(points, titles, strict=True)):
            marked = index in series.marked
            parts.append(svg.dot(x, y, color, words, radius=6 if marked else 3, hollow=marked))
    for (x, y), words in zip(points, series.names, strict=False):
        at_end = x > WIDTH - _RIGHT - _LETTER * len(words) - 10
        parts.append(text(x - 8 if at_end else x + 8, y - 6, words, size=10, anchor="end" if at_end else "start"))
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    if len(entries) < 2:
        return []
    parts, at = [], float(WIDTH - _RIGHT)
    for color, label in reversed(entries):
        parts.append(text(at, _TOP - 6, label, anchor="end", color=color))
        at -= _LETTER * len(label) + 10
    return parts


@dataclass(frozen=True)
class Bar:
    """A value with its name."""

    name: str
    value: float
    words: str
    """The value as it is written behind the bar."""
    low: float | None = None
    high: float | None = None
    """Ends of an error bar."""
    color: str = COLORS[0]


def bars(title: str, entries: Sequence[Bar], *, top: float | None = None) -> Picture:
    """Horizontal bars from 0, each with its value behind it; `top`: the value of a full bar."""
    left = _name_width([bar.name for bar in entries])
    room = WIDTH - left - _VALUE_WIDTH
    most = top or max((max(bar.value, bar.high or 0.0) for bar in entries), default=1.0) or 1.0
    parts = [text(12, _HEAD - 12, title, size=12)]
    for index, bar in enumerate(entries):
        y, scale = _HEAD + index * _ROW, room / most
        parts.append(text(left - 8, y + 14, bar.name, anchor="end"))
        parts.append(svg.rect(left, y, scale * bar.value, _ROW - 6, bar.color, f"{bar.name}: {bar.words} {title}"))
        end = bar.value
        if bar.low is not None and bar.high is not None and bar.low < bar.high:
            end = max(end, bar.high)
            low, high = left + scale * bar.low, left + scale * bar.high
            parts.append(svg.line(low, y + 10, high, y + 10, color=svg.INK, width=1.5))
            parts += [svg.line(at, y + 6, at, y + 14, color=svg.INK, width=1.5) for at in (low, high)]
        parts.append(text(left + scale * end + 6, y + 14, bar.words))
    return Picture(title, "".join(parts), height=_HEAD + _ROW * len(entries) + 4)


def _name_width(names: Sequence[str]) -> float:
    """Width of the column of names."""
    return max(_LEAST_NAME_WIDTH, _LETTER * max(map(len, names), default=0) + 14)


@dataclass(frozen=True)
class Stack:
    """A bar of parts that add up."""

    name: str
    parts: Sequence[tuple[str, float]]
    words: str
    """The sum as it is written behind the bar."""


def stacks(title: str, entries: Sequence[Stack], unit: str, *, top: float | None = None) -> Picture:
    """Horizontal bars of parts; parts of one name have one colour, which a legend names."""
    names = list(dict.fromkeys(name for entry in entries for name, _ in entry.parts))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    left = _name_width([entry.name for entry in entries])
    room = WIDTH - left - _VALUE_WIDTH
    most = top or max((sum(value for _, value in entry.parts) for entry in entries), default=1.0) or 1.0
    drawn = [text(12, _HEAD - 12, title, size=12)]
    for index, entry in enumerate(entries):
        y, at = _HEAD + index * _ROW, float(left)
        drawn.append(text(left - 8, y + 14, entry.name, anchor="end"))
        for name, value in entry.parts:
            width = room * value / most
            drawn.append(svg.rect(at, y, width, _ROW - 6, colors[name], f"{name}: {number(value)} {unit}"))
            at += width
        drawn.append(text(at + 6, y + 14, entry.words))
    x, y = 12.0, _HEAD + _ROW * len(entries) + 14
    for name in names:
        width = 14 + _LETTER * len(name) + 12
        if x + width > WIDTH:
            x, y = 12.0, y + 17
        drawn.append(svg.rect(x, y - 9, 10, 10, colors[name], name))
        drawn.append(text(x + 14, y, name, color=SOFT))
        x += width
    return Picture(title, "".join(drawn), height=y + 10)
