"""Prometheus's text format."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hasten.server.histogram import Histogram

CONTENT_TYPE = "text/plain; charset=utf-8"

Labels = Mapping[str, str]


@dataclass
class Family:
    """All samples of one metric."""

    name: str
    kind: str
    """counter, gauge or histogram."""
    help: str
    samples: list[str] = field(default_factory=list)

    def add(self, labels: Labels, value: float, suffix: str = "") -> None:
        """Add a sample."""
        self.samples.append(f"{self.name}{suffix}{_labels(labels)} {_number(value)}\n")

    def add_histogram(self, labels: Labels, histogram: Histogram) -> None:
        """Add all samples of a histogram."""
        below = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            below += count
            self.add({**labels, "le": _number(bound)}, below, "_bucket")
        self.add(labels, histogram.total, "_sum")
        self.add(labels, below, "_count")

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
