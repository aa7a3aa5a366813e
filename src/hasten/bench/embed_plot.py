"""A picture of how fast engines embed texts, as SVG: a bar for each."""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from hasten.bench.embed import EmbedResult
from hasten.bench.svg import COLORS, TITLE_HEIGHT, document, text
from hasten.core.files import write_text

_WIDTH, _LEFT, _RIGHT, _ROW, _HEAD = 560, 150, 90, 26, 24


def write_plot(path: str, title: str, results: Sequence[EmbedResult]) -> None:
    """Write the picture; an OSError names the file."""
    write_text(Path(path), svg(title, results))


def svg(title: str, results: Sequence[EmbedResult]) -> str:
    """The picture's text."""
    panel = _HEAD + _ROW * len(results)
    panels = (
        ("texts per second", [result.texts_per_second for result in results]),
        ("tokens per second", [result.tokens_per_second for result in results]),
    )
    names = [result.engine for result in results]
    parts = [
        f'<g transform="translate(0 {TITLE_HEIGHT + index * panel})">{_panel(name, names, values)}</g>'
        for index, (name, values) in enumerate(panels)
    ]
    return document(_WIDTH, TITLE_HEIGHT + len(panels) * panel + 8, title, parts)


def _panel(name: str, names: Sequence[str], values: Sequence[float]) -> str:
    room, most = _WIDTH - _LEFT - _RIGHT, max(values)
    parts = [text(_LEFT, _HEAD - 8, name, size=12)]
    for index, (engine, value) in enumerate(zip(names, values, strict=True)):
        y, width = _HEAD + index * _ROW, room * value / most
        color = COLORS[0 if index == len(names) - 1 else 1]
        parts.append(text(_LEFT - 8, y + 15, engine, anchor="end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_ROW - 6}" fill="{color}">'
            f"<title>{escape(f'{engine}: {value:.1f} {name}')}</title></rect>"
        )
        parts.append(text(_LEFT + width + 6, y + 15, f"{value:.1f}" if value < 1000 else f"{value:.0f}"))
    return "".join(parts)
