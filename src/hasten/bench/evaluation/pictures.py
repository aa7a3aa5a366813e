"""The pictures of a report."""

from collections.abc import Sequence

from hasten.bench import plots
from hasten.bench.charts import Axis, Bar, Picture, Series, Stack, bars, number, plot, sheet, stacks
from hasten.bench.evaluation.form import ModelReport
from hasten.bench.evaluation.limits import Memory, Roofline
from hasten.bench.slo import Slo
from hasten.bench.svg import COLORS, SOFT
from hasten.bench.sweep import Point, Sweep, knee

_GIB = 1 << 30


def summary(report: ModelReport, about: str) -> str:
    """All pictures of a report as a document, below its headline; `about` says of what and where."""
    found = report["accuracy"]
    every = [
        *plots.accuracies(found.engines),
        *plots.latencies(report["latency"].results),
        *served(report),
        *joules(report),
        *hardware(report),
        plots.starts(report["startup"].starts),
    ]
    return sheet(report["headline"], every, about=about)


def served(report: ModelReport) -> list[Picture]:
    """The served model by requests in flight."""
    sweeps, slo = report["serving"], Slo.parse(report["slo"])
    return [
        pareto([(label, each.points) for label, each in zip(labels(sweeps), sweeps, strict=True)], slo),
        tails(sweeps[0], "ttft", "time to first token, ms", slo),
        tails(sweeps[0], "itl", "between tokens, ms", slo),
    ]


def joules(report: ModelReport) -> list[Picture]:
    """Energy by requests in flight; none where it was not measured."""
    points = report["serving"][0].points
    return [energy(points)] if any(point.joules_per_token is not None for point in points) else []


def hardware(report: ModelReport) -> list[Picture]:
    """Roofline and memory; none where the model's plan is not known."""
    plan, limits = report["plan"], report["roofline"]
    if plan is None or limits is None:
        return []
    return [roofline(limits), memory(plan.memory), weights(plan.memory)]


def pareto(lines: Sequence[tuple[str, Sequence[Point]]], slo: Slo) -> Picture:
    """Tokens per second of all users over those of each user, a line for each label, with the knee marked."""
    series = []
    for label, measured in lines:
        points = [point for point in measured if point.user_tokens_per_second and point.load.output_throughput]
        best = knee(points, slo)
        series.append(
            Series(
                label,
                [(point.user_tokens_per_second or 0.0, point.load.output_throughput or 0.0) for point in points],
                [f"{label}, {point.concurrency} in flight" for point in points],
                [f"{point.concurrency}{' (knee)' if point is best else ''}" for point in points],
                marked=[index for index, point in enumerate(points) if point is best],
            )
        )
    users = [x for each in series for x, _ in each.points]
    rates = [y for each in series for _, y in each.points]
    return plot(
        "all users' tokens per second",
        Axis.linear("tokens per second of each user", users),
        Axis.linear("", rates),
        series,
    )


def labels(sweeps: Sequence[Sweep]) -> list[str]:
    """Names of servers that tell them apart."""
    return [each.label if each.start_s is not None or len(sweeps) < 3 else each.address for each in sweeps]


def tails(measured: Sweep, name: str, title: str, slo: Slo) -> Picture:
    """Percentiles of a latency over the concurrency."""
    names = [str(point.concurrency) for point in measured.points]
    series = []
    for key in ("p50", "p95", "p99"):
        points = [
            (float(index), getattr(latency, key))
            for index, point in enumerate(measured.points)
            if (latency := getattr(point.load, name)) is not None
        ]
        series.append(
            Series(key, points, [f"{key} at {names[int(index)]}: {number(value)} ms" for index, value in points])
        )
    values = [y for each in series for _, y in each.points]
    limit = slo.limits.get(name)
    shown = [limit] if limit is not None and limit <= 2 * max(values, default=0.0) else []
    return plot(
        title,
        Axis.words("requests in flight", names),
        Axis.linear("", [*values, *shown]),
        series,
        [(value, f"limit {number(value)} ms") for value in shown],
    )


def energy(points: Sequence[Point]) -> Picture:
    """Joules per output token over the concurrency."""
    names = [str(point.concurrency) for point in points]
    values = [
        (float(index), point.joules_per_token)
        for index, point in enumerate(points)
        if point.joules_per_token is not None
    ]
    titles = [f"{number(value)} J per token at {names[int(index)]}" for index, value in values]
    return plot(
        "joules per output token",
        Axis.words("requests in flight", names),
        Axis.linear("", [value for _, value in values]),
        [Series("", values, titles)],
    )


def roofline(found: Roofline) -> Picture:
    """Operations per second over operations per byte, both logarithmic, below the device's roof."""
    device, steps = found.device, found.steps
    ridge = device.flops / device.bytes_per_second
    giga = 1e9
    low = min(ridge / 8, *(step.operations_per_byte for step in steps)) / 1.3
    high = max(ridge * 8, *(step.operations_per_byte for step in steps)) * 1.3
    roof = [(low, low * device.bytes_per_second / giga), (ridge, device.flops / giga), (high, device.flops / giga)]
    reached = [(step.operations_per_byte, step.operations_per_second / giga) for step in steps]
    xs = [x for x, _ in (*roof, *reached)]
    ys = [y for _, y in (*roof, *reached)]
    titles = [f"{step.what}: {number(y)} GFLOP/s, {step.limit}" for step, (_, y) in zip(steps, reached, strict=True)]
    decodes = [index for index, step in enumerate(steps) if step.what.startswith("decode")]
    prompts = [index for index in range(len(steps)) if index not in decodes]
    parts = [
        Series("roof", roof, color=SOFT, dots=False),
        *(
            Series(
                label,
                [reached[i] for i in numbers],
                [titles[i] for i in numbers],
                [steps[i].what.rpartition(", ")[2] for i in numbers],
                color,
                joined=False,
            )
            for label, numbers, color in (("decode", decodes, COLORS[0]), ("prompts", prompts, COLORS[2]))
        ),
    ]
    return plot("GFLOP/s reached", Axis.log("operations per byte", xs), Axis.log("", ys), parts)


def memory(found: Memory) -> Picture:
    """What a rank's memory is used for."""
    fit = found.fit
    cache = fit.cache_tokens * found.kv_bytes_per_token
    parts = [
        ("weights", found.fit.weight_bytes / _GIB),
        ("to compute with", fit.working_bytes / _GIB),
        ("cache", cache / _GIB),
        ("not used", max(0, found.nbytes - fit.weight_bytes - fit.working_bytes - cache) / _GIB),
    ]
    whole = found.nbytes / _GIB
    return stacks("memory of a rank, GiB", [Stack("memory", parts, number(whole))], "GiB", top=whole)


def weights(found: Memory) -> Picture:
    """The weights by part."""
    scale, unit = (_GIB, "GiB") if found.fit.weight_bytes >= _GIB else (1 << 20, "MiB")
    entries = [Bar(part, nbytes / scale, f"{number(nbytes / scale)}") for part, nbytes in found.parts.items()]
    return bars(f"weights of a rank, {unit}", entries)
