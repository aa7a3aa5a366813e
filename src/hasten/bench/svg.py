"""Elements of the benchmarks' pictures, as SVG.

Colours are variables, so that a page chooses them for light and dark (`inline`); a file of its own (`document`) has the
light ones written in.
"""

import re
from collections.abc import Iterable, Mapping
from xml.sax.saxutils import escape, quoteattr

PALETTE: Mapping[str, str] = {
    "ink": "#333333",
    "soft": "#59636e",
    "grid": "#dddddd",
    "ground": "#ffffff",
    "series-1": "#0072b2",
    "series-2": "#e69f00",
    "series-3": "#d55e00",
    "series-4": "#009e73",
    "series-5": "#cc79a7",
    "series-6": "#56b4e9",
}
"""Colours on a light ground by name; the series are distinguishable with colour blindness."""
INK, SOFT, GRID, GROUND = (f"var(--{name})" for name in ("ink", "soft", "grid", "ground"))
COLORS = tuple(f"var(--{name})" for name in PALETTE if name.startswith("series"))
TITLE_HEIGHT = 36
_VARIABLE = re.compile(r"var\(--([\w-]+)\)")


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11, color: str = INK) -> str:
    """Words at a position."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(words)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, *, color: str = GRID, width: float = 1, dash: str = "") -> str:
    """A straight line."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width:g}"'
        f"{dashes}/>"
    )


def rect(x: float, y: float, width: float, height: float, color: str, title: str) -> str:
    """A filled rectangle that shows its title where the pointer rests on it."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" fill="{color}">'
        f"<title>{escape(title)}</title></rect>"
    )


def dot(x: float, y: float, color: str, title: str, *, radius: float = 3, hollow: bool = False) -> str:
    """A circle that shows its title where the pointer rests on it."""
    look = f'fill="{GROUND}" stroke="{color}" stroke-width="2"' if hollow else f'fill="{color}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" {look}><title>{escape(title)}</title></circle>'


def moved(x: float, y: float, body: str) -> str:
    """A part of a picture at another position."""
    return f'<g transform="translate({x:g} {y:g})">{body}</g>'


def document(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole picture under a title, which takes the first `TITLE_HEIGHT` of its height."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">'
    )
    ground = f'<rect width="{width}" height="{height}" fill="{GROUND}"/>'
    whole = "\n".join([head, ground, text(12, 24, title, size=14), *parts, "</svg>\n"])
    return _VARIABLE.sub(lambda found: PALETTE[found[1]], whole)


def inline(width: int, height: int, title: str, body: str) -> str:
    """A picture inside a page, as wide as its surroundings, with the page's colours."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label={quoteattr(title)} font-size="11">{body}</svg>'
