"""The sections of a report's page: pictures, tables, and how to read them."""

from hasten.bench import plots
from hasten.bench.charts import number
from hasten.bench.evaluation import pictures
from hasten.bench.evaluation.accuracy import Comparison, Difference
from hasten.bench.evaluation.form import ModelReport
from hasten.bench.evaluation.html import Html, paragraph, section, table
from hasten.bench.evaluation.html import pictures as shown
from hasten.bench.load.metrics import Latency
from hasten.bench.plots import name_of
from hasten.bench.slo import Slo
from hasten.bench.sweep import Point, Sweep, knee

_SHOWN_DIFFERENCES = 20
_GB, _MB = 1e9, 1e6
_SMALL_MARGIN = 0.05
"""In nats, below which two tokens are as good as tied."""


def own_knee(report: ModelReport) -> tuple[Sweep, Point | None]:
    """Hasten's own sweep, and its knee if any."""
    own = report["serving"][0]
    return own, knee(own.points, Slo.parse(report["slo"]))


def accuracy(report: ModelReport) -> Html:
    """Accuracy of each engine, and the answers that differ."""
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
    text += (
        f" The margin is the log-probability of hasten's first differing token minus that of {name}'s, in nats, as "
        "hasten computes both."
    )
    if ties := sum(abs(each.margin) < _SMALL_MARGIN for each in found.differing):
        text += f" On {ties} of {len(found.differing)} texts it is below {_SMALL_MARGIN}: ties that rounding decides."
    columns = ("text", "its end", "right", name, "hasten", "first differing token", "margin")
    rows = [_difference(each) for each in found.differing[:_SHOWN_DIFFERENCES]]
    more = len(found.differing) - len(rows)
    after = [paragraph(f"{more} more are in the JSON.", "lead")] if more else []
    return Html("".join((paragraph(text), table(columns, rows, kind="words"), *after)))


def _difference(each: Difference) -> tuple[object, ...]:
    theirs, ours = (
        f"{text!r} ({number})"
        for text, number in ((each.their_token, each.their_token_id), (each.our_token, each.our_token_id))
    )
    tokens = f"{each.position + 1}: {theirs} → {ours}"
    return each.number, f"…{each.prompt_end}", each.target, each.theirs, each.ours, tokens, f"{each.margin:+.3f}"


def latency(report: ModelReport) -> Html:
    """Batches of equal requests in one process."""
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


def serving(report: ModelReport) -> Html:
    """The served model by requests in flight."""
    sweeps, slo = report["serving"], Slo.parse(report["slo"])
    own, best = own_knee(report)
    lead = (
        f"Streams of OpenAI's API, {own.prompt_length} tokens in and {own.output_length} out, each sent when another "
        f"ends. The objective is {slo} at the 95th percentile; "
    )
    lead += (
        f"the knee, the highest throughput that keeps it, is at {best.concurrency} requests in flight."
        if best is not None
        else "no measured concurrency keeps it."
    )
    parts: list[Html] = [shown(pictures.served(report))]
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


def cost(report: ModelReport) -> Html:
    """Price and energy per token."""
    own, found = report["serving"][0], report["cost"]
    parts: list[Html] = []
    if found is None:
        parts.append(paragraph(_why_no_cost(report), "lead"))
    else:
        rows = [
            ("machine, per hour", dollars(found.price_per_hour)),
            ("per million input tokens", dollars(found.input_per_million)),
            ("per million output tokens", dollars(found.output_per_million)),
            ("requests per dollar", number(found.requests_per_dollar)),
        ]
        lead = (
            f"At {found.concurrency} requests in flight, busy all the time. An input token costs its part of the rate "
            "of prompts alone, an output token what remains; together they are the price of the machine."
        )
        parts += [paragraph(lead, "lead"), table(("price", "$"), rows)]
    if energy := pictures.joules(report):
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
        parts.append(shown(energy))
        columns = ("in flight", "joules per output token", "watts of all GPUs", "SM clock, MHz", "memory clock, MHz")
        parts.append(table(columns, energies))
    else:
        parts.append(paragraph("Energy is measured on NVIDIA GPUs alone, by nvidia-smi.", "lead"))
    return section("Money and energy", *parts)


def _why_no_cost(report: ModelReport) -> str:
    if own_knee(report)[1] is None:
        return "No price per token: no measured concurrency keeps the objective."
    return "No price per token: --price-per-hour says what the machine costs."


def hardware(report: ModelReport) -> Html:
    """Roofline and memory plan."""
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
        shown(pictures.hardware(report)),
        table(columns, rows),
        paragraph(summary, "lead"),
    )


def start(report: ModelReport) -> Html:
    """Cold and warm starts."""
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


def _bytes(count: float) -> str:
    return f"{number(count / _GB)} GB" if count >= _GB else f"{number(count / _MB)} MB"


def dollars(value: float) -> str:
    """An amount of money."""
    return f"${value:.2f}" if value >= 0.1 else f"${value:.3g}"
