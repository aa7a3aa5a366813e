"""What pictures of benchmarks are made of, as SVG."""

from collections.abc import Iterable
from xml.sax.saxutils import escape

COLORS = ("#0072b2", "#e69f00", "#d55e00", "#009e73")
"""Distinguishable with colour blindness."""
TITLE_HEIGHT = 36


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11, color: str = "#333") -> str:
    """Words at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(words)}</text>'
    )


def document(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole picture under a title, which takes the first `TITLE_HEIGHT` of its height."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">'
    )
    ground = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, ground, text(12, 24, title, size=14), *parts, "</svg>\n"])
