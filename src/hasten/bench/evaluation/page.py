"""A report on a model as one HTML page that needs nothing else."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from hasten.bench.charts import number
from hasten.bench.evaluation import pictures, sections
from hasten.bench.evaluation.form import ModelReport
from hasten.bench.evaluation.headline import TIMES
from hasten.bench.evaluation.html import Html, definitions, paragraph, section, table, tiles, words
from hasten.bench.plots import name_of
from hasten.bench.png import write_png
from hasten.bench.report import to_json
from hasten.core.files import write_text

_HASH_LETTERS = 12


def write_page(path: Path, report: ModelReport, full: dict[str, Any]) -> None:
    """Write the page; `full` is the report as its JSON file has it. An OSError names the file."""
    write_text(path, page(report, full))


def write_picture(path: Path, report: ModelReport) -> None:
    """Write all pictures as one PNG, which needs the extra `png`. An OSError names the file."""
    write_png(path, pictures.summary(report, _about(report)))


def page(report: ModelReport, full: dict[str, Any]) -> str:
    """The page's text, with the whole JSON in a script element that is not run."""
    style = files("hasten.bench.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    data = json.dumps(to_json(full), ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    body = "".join(_body(report))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{words(report['model'])}: {words(report['headline'])}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="report">{data}</script>\n</body>\n</html>\n'
    )


def _body(report: ModelReport) -> Iterator[Html]:
    yield paragraph(_about(report), "about")
    yield Html(f"<h1>{words(report['headline'])}</h1>")
    yield paragraph(_summary(report), "lead")
    yield tiles(_tiles(report))
    yield sections.accuracy(report)
    yield sections.latency(report)
    yield sections.serving(report)
    yield sections.cost(report)
    yield sections.hardware(report)
    yield sections.start(report)
    yield _provenance(report)
    yield Html(f"<footer>{words(_footer(report))}</footer>")


def _about(report: ModelReport) -> str:
    environment = report["provenance"].environment
    where = "" if environment is None else f" · {environment.dtype} on {environment.device}, {_threads(report)}"
    return f"hasten report · {report['model']} · {report['provenance'].date}{where}"


def _threads(report: ModelReport) -> str:
    environment, provenance = report["provenance"].environment, report["provenance"]
    if environment is None or provenance.gpus:
        return f"{len(provenance.gpus)} GPU{'s' * (len(provenance.gpus) > 1)}"
    return f"{environment.threads} thread{'s' * (environment.threads > 1)}"


def _summary(report: ModelReport) -> str:
    found = report["accuracy"]
    own = found.engines[-1]
    parts = [f"The last words of {found.samples} texts ({found.dataset}), {found.batch_size} texts per batch:"]
    parts.append(", ".join(f"{name_of(each.engine)} {number(each.seconds)} s" for each in found.engines) + ".")
    for each in found.comparisons:
        same = own.total - len(each.differing)
        parts.append(f"The same answers as {name_of(each.engine)} on {same} of {own.total}.")
    return " ".join(parts)


def _tiles(report: ModelReport) -> Iterator[tuple[str, str]]:
    own, comparisons = report["accuracy"].engines[-1], report["accuracy"].comparisons
    if comparisons:
        first = comparisons[0]
        low, high = first.speedup_range.low, first.speedup_range.high
        spread = f", {low:.2f} to {high:.2f}" if low < high else ""
        yield f"{first.speedup:.2f} {TIMES}", f"the speed of {name_of(first.engine)}{spread}"
    yield f"{own.accuracy:.1f}%", f"accuracy, {own.interval.low:.1f} to {own.interval.high:.1f}"
    points, best = sections.own_knee(report)
    if best is None:
        most = max(points.points, key=lambda point: point.load.output_throughput or 0.0)
        yield number(most.load.output_throughput), f"output tokens per second, {most.concurrency} in flight"
        yield "none", f"of the measured concurrencies keeps {report['slo']}"
    else:
        yield number(best.load.output_throughput), f"output tokens per second, {best.concurrency} in flight"
        if best.load.ttft is not None and best.load.itl is not None:
            yield f"{number(best.load.ttft.p95)} ms", "time to first token there, p95"
            yield f"{number(best.load.itl.p95)} ms", "between tokens there, p95"
        if best.joules_per_token is not None:
            yield f"{number(best.joules_per_token)} J", "per output token there"
    if report["cost"] is not None:
        yield sections.dollars(report["cost"].output_per_million), "per million output tokens"


def _provenance(report: ModelReport) -> Html:
    found = report["provenance"]
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    gpus = [
        f"{gpu.name}, driver {gpu.driver}, power limit {number(gpu.power_limit_watts)} W, clocks up to "
        f"{number(gpu.max_sm_clock_mhz)} MHz (SM) and {number(gpu.max_memory_clock_mhz)} MHz (memory)"
        for gpu in found.gpus
    ]
    entries: list[tuple[str, object]] = [
        ("command", Html(f"<code>{words(found.command)}</code>")),
        ("model, SHA-256", Html(f"<code>{words(found.model_sha256)}</code>")),
        ("processor", f"{found.processor}, {found.cpus} CPUs for this process"),
        *(("GPU", gpu) for gpu in gpus),
        ("system", found.system),
        ("versions", packages),
    ]
    rows = [(file.name, f"{file.nbytes:,}", _short_hash(file.sha256)) for file in found.files]
    notes = [paragraph(note, "lead") for note in report["notes"]]
    return section(
        "To repeat it", definitions(entries), Html("<br>"), table(("file", "bytes", "SHA-256"), rows), *notes
    )


def _short_hash(digest: str) -> Html:
    return Html(f'<code title="{words(digest)}">{words(digest[:_HASH_LETTERS])}…</code>')


def _footer(report: ModelReport) -> str:
    version = report["provenance"].packages.get("hasten", "")
    return f"Written by hasten {version}. All figures, with the schema's version, are in the JSON next to this page."
