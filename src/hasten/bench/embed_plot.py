"""Plots of embedding speed, with a bar for each engine."""

from collections.abc import Sequence

from hasten.bench.charts import Bar, Picture, bars
from hasten.bench.embed import EmbedResult
from hasten.bench.svg import COLORS


def pictures(results: Sequence[EmbedResult]) -> list[Picture]:
    """Texts and tokens per second."""
    panels = (
        ("texts per second", [result.texts_per_second for result in results]),
        ("tokens per second", [result.tokens_per_second for result in results]),
    )
    names = [result.engine for result in results]
    return [_panel(name, names, values) for name, values in panels]


def _panel(name: str, names: Sequence[str], values: Sequence[float]) -> Picture:
    last = len(names) - 1
    words = [f"{value:.1f}" if value < 1000 else f"{value:.0f}" for value in values]
    rows = zip(names, values, words, strict=True)
    return bars(name, [Bar(*row, color=COLORS[0 if at == last else 1]) for at, row in enumerate(rows)])
