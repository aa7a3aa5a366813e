"""Options of a report: its subject, and how much is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hasten.bench.against import Against
from hasten.bench.slo import Slo
from hasten.bench.sweep import SweepOptions


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    samples: int | None
    """Texts at most; None: all."""
    accuracy_repetitions: int
    batch_sizes: tuple[int, ...]
    repetitions: int
    latency_length: int
    """Tokens of prompts and outputs."""
    concurrencies: tuple[int, ...]
    load: SweepOptions
    starts: int

    def within(self, limit: int | None) -> "Scale":
        """The same with sequences of at most `limit` tokens; prompts and outputs have half of it each."""
        if limit is None:
            return self
        half = max(2, limit // 2)
        load = replace(
            self.load,
            prompt_length=min(self.load.prompt_length, half),
            output_length=min(self.load.output_length, half - 1),
        )
        return replace(self, latency_length=min(self.latency_length, half), load=load)


FULL = Scale(
    samples=None,
    accuracy_repetitions=3,
    batch_sizes=(1, 8, 32),
    repetitions=3,
    latency_length=128,
    concurrencies=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    load=SweepOptions(),
    starts=2,
)
QUICK = Scale(
    samples=128,
    accuracy_repetitions=1,
    batch_sizes=(1, 16),
    repetitions=2,
    latency_length=32,
    concurrencies=(1, 4, 16),
    load=SweepOptions(prompt_length=64, output_length=32, least_requests=8, rounds=2),
    starts=1,
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What to report on."""

    model: str
    engine: Mapping[str, Any]
    """Keyword arguments of EngineConfig.create besides the model."""
    dataset: str
    """File of JSON lines, each an object with `text`."""
    hf_model: str | None = None
    """What Hugging Face and others run; None: the model."""
    against: Against
    slo: Slo
    price_per_hour: float | None = None
    scale: Scale = FULL
    batch_size: int = 16
    """Of texts."""
    command: str = ""
