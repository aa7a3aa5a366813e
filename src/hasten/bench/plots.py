"""The pictures of benchmarks that run in one process: a bar for each engine, hasten's in one colour everywhere."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hasten.bench.charts import Bar, Picture, Stack, bars, number, stacks
from hasten.bench.intervals import wilson
from hasten.bench.latency import LatencyResult
from hasten.bench.startup import Start
from hasten.bench.svg import COLORS
from hasten.bench.throughput import ThroughputResult

if TYPE_CHECKING:
    from hasten.bench.serving import Turns

OWN = "hasten"
_NAMES = {"HF": "Hugging Face", "HF generate_batch": "HF, continuous", "ctranslate2": "CTranslate2"}
_SUITE = {
    "output tokens per second": ("tok_s_e2e", "out_tok_s"),
    "ms per step of one token": ("ms_per_tok", "ms_per_step"),
    "seconds to the first token": ("ttft_s", "prefill_s"),
    "requests per second": ("req_s",),
}
"""Pictures of the suite, and the figures that they show."""


class Scored(Protocol):
    """An engine's result on texts."""

    @property
    def engine(self) -> str:
        """Label."""

    @property
    def accuracy(self) -> float:
        """Per cent."""

    @property
    def right(self) -> int:
        """Texts."""

    @property
    def total(self) -> int:
        """Texts."""

    @property
    def seconds(self) -> float:
        """Median."""

    @property
    def repetition_seconds(self) -> list[float]:
        """Of each repetition."""


def name_of(engine: str) -> str:
    """How an engine is called in a picture or a sentence."""
    return _NAMES.get(engine, engine)


def accuracies(results: Sequence[Scored]) -> list[Picture]:
    """Accuracy with 95% intervals, and time from the least to the largest of the repetitions."""
    colors = _colors([each.engine for each in results])
    right, seconds = [], []
    for each in results:
        name, color, interval = name_of(each.engine), colors[each.engine], wilson(each.right, each.total)
        right.append(Bar(name, each.accuracy, f"{each.accuracy:.1f}%", interval.low, interval.high, color))
        low, high = min(each.repetition_seconds), max(each.repetition_seconds)
        seconds.append(Bar(name, each.seconds, f"{number(each.seconds)} s", low, high, color))
    return [
        bars("accuracy, % of the texts, 95% interval", right, top=100),
        bars(f"seconds for {results[0].total} texts, less is better", seconds),
    ]


def latencies(results: Sequence[LatencyResult]) -> list[Picture]:
    """Medians of each engine by batch size, less is better."""
    colors = _colors([each.engine for each in results])
    pictures = []
    for name, unit in (("first_token_ms", "ms to the first token"), ("token_ms", "ms per further token")):
        for size in dict.fromkeys(each.batch_size for each in results):
            values = [(each.engine, getattr(each, name).p50) for each in results if each.batch_size == size]
            rows = [Bar(name_of(who), value, f"{number(value)} ms", color=colors[who]) for who, value in values]
            pictures.append(bars(f"{unit}, batch {size}", rows))
    return pictures


def throughputs(results: Sequence[ThroughputResult]) -> list[Picture]:
    """Rates of each engine, with the least and the largest of the repetitions."""
    colors = _colors([each.engine for each in results])
    rows = []
    for each in results:
        low, high = (each.output_tokens / seconds for seconds in (max(each.seconds), min(each.seconds)))
        value, color = each.output_tokens_per_second, colors[each.engine]
        rows.append(Bar(name_of(each.engine), value, number(value), low, high, color))
    requests = [
        Bar(
            name_of(each.engine),
            each.requests_per_second,
            number(each.requests_per_second),
            color=colors[each.engine],
        )
        for each in results
    ]
    return [bars("output tokens per second", rows), bars("requests per second", requests)]


def suites(report: Mapping[str, Any]) -> list[Picture]:
    """The figures of a suite's workloads, of hasten and, where it was measured, Hugging Face."""
    engines = {"HF": report.get("hf", {}), OWN: report}
    colors = _colors(list(engines))
    pictures = []
    for title, keys in _SUITE.items():
        rows = []
        for workload, figures in report.items():
            if not isinstance(figures, dict) or not any(key in figures for key in keys):
                continue
            for engine, measured in engines.items():
                value = next((measured.get(workload, {}).get(key) for key in keys if key in figures), None)
                if value is not None:
                    rows.append(Bar(f"{workload}, {engine}", value, number(value), color=colors[engine]))
        if rows:
            pictures.append(bars(title, rows))
    return pictures


def starts(found: Sequence[Start]) -> Picture:
    """Seconds of a start by phase; phases of less than a fiftieth are joined."""
    least = max(start.total_s for start in found) / 50
    entries = []
    for start in found:
        large = [(name, seconds) for name, seconds in start.phases.items() if seconds >= least]
        rest = math.fsum(seconds for seconds in start.phases.values() if 0 < seconds < least)
        entries.append(Stack(start.kind, [*large, ("rest", rest)], f"{start.total_s:.1f} s"))
    return stacks("seconds from nothing to the first token", entries, "s")


def turns(found: "Sequence[Turns]") -> list[Picture]:
    """The medians of each measure, by who was measured."""
    pictures = []
    for each in found:
        rows = [
            Bar(who, spread.p50, number(spread.p50), color=COLORS[at % len(COLORS)])
            for at, (who, spread) in enumerate(each.values.items())
        ]
        pictures.append(bars(f"{each.name}, {each.unit}", rows))
    return pictures


def _colors(engines: Sequence[str]) -> dict[str, str]:
    """A colour for each engine; hasten's is the first."""
    others = [engine for engine in dict.fromkeys(engines) if engine != OWN]
    return {OWN: COLORS[0]} | {engine: COLORS[1 + at % (len(COLORS) - 1)] for at, engine in enumerate(others)}
