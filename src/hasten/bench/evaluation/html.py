"""Parts of a page as HTML; all words are escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hasten.bench.charts import Picture


class Html(str):
    """Text that is HTML already."""


def words(value: object) -> Html:
    """Any value as text of a page."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def paragraph(text: object, kind: str = "") -> Html:
    """A paragraph, of a class of the style sheet."""
    return Html(f"<p{_class(kind)}>{words(text)}</p>")


def section(title: str, *parts: object) -> Html:
    """A heading and what belongs to it."""
    return Html(f"<section><h2>{words(title)}</h2>{''.join(map(words, parts))}</section>")


def tiles(figures: Iterable[tuple[str, str]]) -> Html:
    """Figures that stand out, each with what it is."""
    cards = (f'<div class="card"><b>{words(figure)}</b><span>{words(what)}</span></div>' for figure, what in figures)
    return Html(f'<div class="tiles">{"".join(cards)}</div>')


def pictures(several: Iterable[Picture]) -> Html:
    """Pictures next to each other, as many as the page's width takes."""
    cards = (f'<div class="card">{picture.inline()}</div>' for picture in several)
    return Html(f'<div class="pictures">{"".join(cards)}</div>')


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, kind: str = "", kinds: Mapping[int, str] | None = None
) -> Html:
    """A table that scrolls where the page is too narrow; `kinds` are the classes of single rows."""
    head = "".join(f"<th>{words(column)}</th>" for column in columns)
    lines = [
        f"<tr{_class((kinds or {}).get(number, ''))}>{''.join(f'<td>{words(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    ]
    whole = f"<table{_class(kind)}><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return Html(f'<div class="card scroll">{whole}</div>')


def definitions(entries: Iterable[tuple[str, object]]) -> Html:
    """Names with their values."""
    rows = (f"<dt>{words(name)}</dt><dd>{words(value)}</dd>" for name, value in entries)
    return Html(f'<div class="card"><dl>{"".join(rows)}</dl></div>')


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
