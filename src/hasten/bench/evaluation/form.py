"""The form of a report on a model, as it is written and shown."""

from dataclasses import dataclass
from typing import TypedDict

from hasten.bench.evaluation.accuracy import Accuracy
from hasten.bench.evaluation.limits import Cost, Plan, Roofline
from hasten.bench.evaluation.provenance import Provenance
from hasten.bench.latency import LatencyResult
from hasten.bench.peers import NotMeasured
from hasten.bench.startup import Start
from hasten.bench.sweep import Sweep


@dataclass(frozen=True)
class Latencies:
    """Batches of equal requests in one process, by engine and batch size; hasten comes last of each."""

    results: list[LatencyResult]
    not_measured: list[NotMeasured]


@dataclass(frozen=True)
class Starts:
    """Cold and warm starts."""

    starts: list[Start]


@dataclass(frozen=True)
class Knee:
    """The concurrency of the highest throughput that keeps the objective."""

    label: str
    """Of the server."""
    concurrency: int | None
    """None where no measured concurrency keeps it."""


class ModelReport(TypedDict):
    """What is written: everything that was measured of one model on one machine."""

    model: str
    headline: str
    slo: str
    provenance: Provenance
    accuracy: Accuracy
    latency: Latencies
    serving: list[Sweep]
    knees: list[Knee]
    cost: Cost | None
    plan: Plan | None
    roofline: Roofline | None
    startup: Starts
    notes: list[str]
