"""A report on a model as one HTML page that needs nothing else."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from hasten.bench import plots
from hasten.bench.charts import number
from hasten.bench.evaluation import pictures
from hasten.bench.evaluation.accuracy import Comparison, Difference
from hasten.bench.evaluation.form import ModelReport
from hasten.bench.evaluation.headline import TIMES
from hasten.bench.evaluation.html import Html, definitions, paragraph, section, table, tiles, words
from hasten.bench.evaluation.html import pictures as shown
from hasten.bench.load.metrics import Latency
from hasten.bench.plots import name_of
from hasten.bench.report import to_json
from hasten.bench.slo import Slo
from hasten.bench.sweep import Point, Sweep, knee
from hasten.core.files import write_text

_SHOWN_DIFFERENCES = 20
_HASH_LETTERS = 12
_GB, _MB = 1e9, 1e6
_SMALL_MARGIN = 0.05
"""In nats, below which two tokens are as good as tied."""


def write_page(path: Path, report: ModelReport, full: dict[str, Any]) -> None:
    """Write the page; `full` is the report as its JSON file has it. An OSError names the file."""
    write_text(path, page(report, full))


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
    environment = report["provenance"].environment
    where = "" if environment is None else f" · {environment.dtype} on {environment.device}, {_threads(report)}"
    yield paragraph(f"hasten report · {report['model']} · {report['provenance'].date}{where}", "about")
    yield Html(f"<h1>{words(report['headline'])}</h1>")
    yield paragraph(_summary(report), "lead")
    yield tiles(_tiles(report))
    yield _accuracy(report)
    yield _latency(report)
    yield _serving(report)
    yield _cost(report)
    yield _hardware(report)
    yield _start(report)
    yield _provenance(report)
    yield Html(f"<footer>{words(_footer(report))}</footer>")


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


def _own_knee(report: ModelReport) -> tuple[Sweep, Point | None]:
    own = report["serving"][0]
    return own, knee(own.points, Slo.parse(report["slo"]))


def _tiles(report: ModelReport) -> Iterator[tuple[str, str]]:
    own, comparisons = report["accuracy"].engines[-1], report["accuracy"].comparisons
    if comparisons:
        first = comparisons[0]
        low, high = first.speedup_range.low, first.speedup_range.high
        spread = f", {low:.2f} to {high:.2f}" if low < high else ""
        yield f"{first.speedup:.2f} {TIMES}", f"the speed of {name_of(first.engine)}{spread}"
    yield f"{own.accuracy:.1f}%", f"accuracy, {own.interval.low:.1f} to {own.interval.high:.1f}"
    points, best = _own_knee(report)
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
        yield _dollars(report["cost"].output_per_million), "per million output tokens"


def _accuracy(report: ModelReport) -> Html:
    found = report["accuracy"]
    rows = [
        (
            name_of(each.engine),
            f"{each.accuracy:.2f}%",
            f"{each.interval.low:.2f} to {each.interval.high:.2f}",
            f"{each.right} of {each.total}",
            number(each.seconds),
        )
        for each in found.engines
    ]
    return section(
        "Accuracy and speed",
        paragraph("Right means that all tokens of the last word are. Error bars are 95% intervals by Wilson.", "lead"),
        shown(plots.accuracies(found.engines)),
        table(("engine", "accuracy", "95% interval", "right", "seconds"), rows),
        *(_differences(each, found.samples) for each in found.comparisons),
    )


def _differences(found: Comparison, samples: int) -> Html:
    name, interval = name_of(found.engine), found.accuracy_difference_interval
    text = (
        f"Compared with {name}: {found.speedup:.2f} times as fast; accuracy {found.accuracy_difference:+.2f} points, "
        f"95% interval {interval.low:+.2f} to {interval.high:+.2f} (bootstrap over the texts); other tokens on "
        f"{len(found.differing)} of {samples} texts."
    )
    if not found.differing:
        return paragraph(text)
    ties = sum(abs(each.margin) < _SMALL_MARGIN for each in found.differing)
    text += (
        f" The margin is the log-probability of hasten's first differing token minus that of {name}'s, as hasten "
        f"computes both; on {ties} of {len(found.differing)} it is below {_SMALL_MARGIN}: ties that rounding decides."
    )
    columns = ("text", "its end", "right", name, "hasten", "first differing token", "margin")
    rows = [_difference(each) for each in found.differing[:_SHOWN_DIFFERENCES]]
    more = len(found.differing) - len(rows)
    after = [paragraph(f"{more} more are in the JSON.", "lead")] if more else []
    return Html("".join((paragraph(text), table(columns, rows, kind="words"), *after)))


def _difference(each: Difference) -> tuple[object, ...]:
    tokens = f"{each.position + 1}: {each.their_token!r} → {each.our_token!r}"
    return each.number, f"…{each.prompt_end}", each.target, each.theirs, each.ours, tokens, f"{each.margin:+.4f}"


def _latency(report: ModelReport) -> Html:
    results = report["latency"].results
    first = results[0]
    rows = [
        (
            str(each.batch_size),
            name_of(each.engine),
            number(each.first_token_ms.p50),
            number(each.token_ms.p50),
            number(each.total_ms.p50),
            number(each.decode_tokens_per_second),
        )
        for each in results
    ]
    lead = (
        f"In one process, engines in turns, {first.prompt_length} tokens in and {first.output_length} out; medians of "
        f"{first.repetitions}."
    )
    return section(
        "Batches, without a server",
        paragraph(lead, "lead"),
        shown(plots.latencies(results)),
        table(("batch", "engine", "first token, ms", "further token, ms", "all, ms", "tokens/s"), rows, kind="named"),
    )


def _serving(report: ModelReport) -> Html:
    sweeps, slo = report["serving"], Slo.parse(report["slo"])
    own, best = _own_knee(report)
    lead = (
        f"Streams of OpenAI's API, {own.prompt_length} tokens in and {own.output_length} out, each sent when another "
        f"ends. The objective is {slo} at the 95th percentile; "
    )
    lead += (
        f"the knee, the highest throughput that keeps it, is at {best.concurrency} requests in flight."
        if best is not None
        else "no measured concurrency keeps it."
    )
    parts: list[Html] = [
        shown(
            [
                pictures.pareto(list(zip(pictures.labels(sweeps), (each.points for each in sweeps), strict=True)), slo),
                pictures.tails(own, "ttft", "time to first token, ms", slo),
                pictures.tails(own, "itl", "between tokens, ms", slo),
            ]
        )
    ]
    for each, label in zip(sweeps, pictures.labels(sweeps), strict=True):
        parts.append(_sweep_table(each, label, slo))
    return section("Served", paragraph(lead, "lead"), *parts)


def _sweep_table(found: Sweep, label: str, slo: Slo) -> Html:
    columns = (
        f"{label}, in flight",
        *("tokens/s", "each user's", "ttft p50", "p95", "p99", "itl p50", "p95", "p99", "requests/s", "failed"),
    )
    best = knee(found.points, slo)
    rows = [
        (
            f"{point.concurrency}{' ← knee' if point is best else ''}",
            number(point.load.output_throughput),
            number(point.user_tokens_per_second),
            *_percentiles(point.load.ttft),
            *_percentiles(point.load.itl),
            number(point.load.request_throughput),
            str(point.load.failed),
        )
        for point in found.points
    ]
    kinds = {index: "knee" for index, point in enumerate(found.points) if point is best}
    return table(columns, rows, kinds=kinds)


def _percentiles(latency: Latency | None) -> tuple[str, str, str]:
    if latency is None:
        return "-", "-", "-"
    return number(latency.p50), number(latency.p95), number(latency.p99)


def _cost(report: ModelReport) -> Html:
    own, found = report["serving"][0], report["cost"]
    parts: list[Html] = []
    if found is None:
        parts.append(paragraph(_why_no_cost(report), "lead"))
    else:
        rows = [
            ("machine, per hour", _dollars(found.price_per_hour)),
            ("per million input tokens", _dollars(found.input_per_million)),
            ("per million output tokens", _dollars(found.output_per_million)),
            ("requests per dollar", number(found.requests_per_dollar)),
        ]
        lead = (
            f"At {found.concurrency} requests in flight, busy all the time. An input token costs its part of the rate "
            "of prompts alone, an output token what remains; together they are the price of the machine."
        )
        parts += [paragraph(lead, "lead"), table(("price", "$"), rows)]
    if any(point.joules_per_token is not None for point in own.points):
        energies = [
            (
                str(point.concurrency),
                number(point.joules_per_token),
                number(point.power.watts),
                number(point.power.sm_clock_mhz),
                number(point.power.memory_clock_mhz),
            )
            for point in own.points
            if point.power is not None
        ]
        parts.append(shown([pictures.energy(own.points)]))
        columns = ("in flight", "joules per output token", "watts of all GPUs", "SM clock, MHz", "memory clock, MHz")
        parts.append(table(columns, energies))
    else:
        parts.append(paragraph("Energy is measured on NVIDIA GPUs alone, by nvidia-smi.", "lead"))
    return section("Money and energy", *parts)


def _why_no_cost(report: ModelReport) -> str:
    if _own_knee(report)[1] is None:
        return "No price per token: no measured concurrency keeps the objective."
    return "No price per token: --price-per-hour says what the machine costs."


def _hardware(report: ModelReport) -> Html:
    plan, roofline = report["plan"], report["roofline"]
    if plan is None or roofline is None:
        return section(
            "The hardware's limits", paragraph("Not known for this model: see the notes at the end.", "lead")
        )
    memory, device = plan.memory, roofline.device
    source = "by its data sheet" if device.is_gpu else "measured in a moment"
    lead = (
        f"{device.name}, {source}: {number(device.bytes_per_second / _GB)} GB/s of memory, "
        f"{number(device.flops / _GB)} GFLOP/s. Expected is what the roofline allows; above 100% of the bandwidth "
        "means that caches hold what is read."
    )
    rows = [
        (
            step.what,
            number(step.tokens_per_second),
            number(step.expected_tokens_per_second),
            f"{step.tokens_per_second / step.expected_tokens_per_second:.0%}",
            f"{step.bandwidth_share:.0%}",
            f"{step.compute_share:.0%}",
            step.limit,
        )
        for step in roofline.steps
    ]
    fit = memory.fit
    summary = (
        f"{_bytes(fit.weight_bytes)} of weights as {memory.dtype} on each of {memory.ranks} "
        f"rank{'s' * (memory.ranks > 1)}, {number(memory.kv_bytes_per_token / 1024)} KiB of cache per token: room for "
        f"{fit.cache_tokens} tokens, {fit.sequences} sequences of {fit.max_model_len}."
    )
    columns = ("step", "tokens/s", "expected", "of it", "bandwidth", "compute", "limited by")
    return section(
        "The hardware's limits",
        paragraph(lead, "lead"),
        shown([pictures.roofline(roofline), pictures.memory(memory), pictures.weights(memory)]),
        table(columns, rows),
        paragraph(summary, "lead"),
    )


def _start(report: ModelReport) -> Html:
    starts = report["startup"].starts
    names = list(dict.fromkeys(name for start in starts for name in start.phases))
    rows: list[tuple[str, ...]] = [
        (name, *(f"{start.phases.get(name, 0.0):.2f}" for start in starts)) for name in names
    ]
    rows.append(("to the first token", *(f"{start.total_s:.2f}" for start in starts)))
    ready = report["serving"][0].start_s
    lead = (
        "Seconds from the start of a process to its first token: cold, without compiled kernels and with the weights "
    )
    lead += "out of the file cache, and warm, right after that."
    if ready is not None:
        lead += f" The server was ready after {ready:.1f} s."
    last = {len(rows) - 1: "knee"}
    return section(
        "Start",
        paragraph(lead, "lead"),
        shown([plots.starts(starts)]),
        table(("phase", *(start.kind for start in starts)), rows, kinds=last),
    )


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


def _bytes(count: float) -> str:
    return f"{number(count / _GB)} GB" if count >= _GB else f"{number(count / _MB)} MB"


def _dollars(value: float) -> str:
    return f"${value:.2f}" if value >= 0.1 else f"${value:.3g}"


def _footer(report: ModelReport) -> str:
    version = report["provenance"].packages.get("hasten", "")
    return f"Written by hasten {version}. All figures, with the schema's version, are in the JSON next to this page."
