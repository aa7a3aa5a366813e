"""The sentence that a report begins with."""

from hasten.bench.evaluation.accuracy import Comparison
from hasten.bench.evaluation.form import ModelReport
from hasten.bench.plots import name_of

TIMES = "\N{MULTIPLICATION SIGN}"


def headline(report: ModelReport) -> str:
    """How many times as fast hasten is as the first engine it was compared with, and at which accuracy."""
    found = report["accuracy"]
    if not found.comparisons:
        own = found.engines[-1]
        return f"{report['model']}: {own.accuracy:.1f}% of {own.total} texts right"
    first = found.comparisons[0]
    return f"{_speed(first)} {name_of(first.engine)}, {_accuracy(first)}"


def _speed(found: Comparison) -> str:
    if found.speedup >= 1.05:
        return f"{found.speedup:.1f}{TIMES} as fast as"
    if found.speedup > 0.95:
        return "As fast as"
    return f"{1 / found.speedup:.1f}{TIMES} slower than"


def _accuracy(found: Comparison) -> str:
    interval, points = found.accuracy_difference_interval, found.accuracy_difference
    if not found.differing:
        return "with the same answers"
    if interval.low <= 0 <= interval.high:
        return "at the same accuracy"
    return f"at an accuracy {abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
