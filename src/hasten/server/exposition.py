"""Metrics in Prometheus's text format, and counts of values by how large they are."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any


@dataclass
class Histogram:
    """How many values were at most so large."""

    bounds: tuple[float, ...]
    """Upper ends of the buckets; one more is without end."""
    counts: list[int] = field(default_factory=list)
    """Of each bucket alone."""
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(self.counts)

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, or `count` equal ones."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def merge(self, other: "Histogram") -> None:
        """Count the values of another histogram with the same bounds."""
        self.counts = [mine + others for mine, others in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def within(self, bounds: Sequence[float]) -> "Histogram":
        """The same values in fewer buckets: `bounds` are some of this one's."""
        merged = Histogram(tuple(bounds), total=self.total)
        for upper, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            merged.counts[bisect_left(merged.bounds, upper)] += count
        return merged


CONTENT_TYPE = "text/plain; charset=utf-8"

Labels = Mapping[str, str]


Value = float | Histogram | None


@dataclass(frozen=True)
class Metric:
    """A metric, and where its samples come from."""

    name: str
    kind: str
    help: str
    value: str | Callable[[Any], Value | Mapping[Any, Value]]
    """Of a thing that is exposed, or its attribute's name; None: it has none. Several are by the values of `label`."""
    label: str = ""


def families(prefix: str, metrics: Iterable[Metric], subjects: Sequence[tuple[Labels, Any]]) -> "Iterator[Family]":
    """All samples of metrics, whose names begin with `prefix`; `subjects`: things, with the labels of their samples."""
    for metric in metrics:
        read = attrgetter(metric.value) if isinstance(metric.value, str) else metric.value
        family = Family(prefix + metric.name, metric.kind, metric.help)
        for labels, source in subjects:
            value = read(source)
            if isinstance(value, Mapping):
                for name, each in value.items():
                    family.add({**labels, metric.label: name}, each)
            else:
                family.add(labels, value)
        yield family


@dataclass
class Family:
    """All samples of one metric."""

    name: str
    kind: str
    """counter, gauge or histogram."""
    help: str
    samples: list[str] = field(default_factory=list)

    def add(self, labels: Labels, value: Value) -> None:
        """Add a sample, all those of a histogram, or none where there is no value."""
        if isinstance(value, Histogram):
            below = 0
            for bound, count in zip((*value.bounds, float("inf")), value.counts, strict=True):
                below += count
                self._add({**labels, "le": _number(bound)}, below, "_bucket")
            self._add(labels, value.total, "_sum")
            self._add(labels, below, "_count")
        elif value is not None:
            self._add(labels, value)

    def _add(self, labels: Labels, value: float, suffix: str = "") -> None:
        self.samples.append(f"{self.name}{suffix}{_labels(labels)} {_number(value)}\n")

    def text(self) -> str:
        """As it is exposed; nothing for a metric without samples."""
        if not self.samples:
            return ""
        return f"# HELP {self.name} {self.help}\n# TYPE {self.name} {self.kind}\n" + "".join(self.samples)


def _labels(labels: Labels) -> str:
    return (
        "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())) + "}" if labels else ""
    )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
