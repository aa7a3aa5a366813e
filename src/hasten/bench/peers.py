"""Engines that hasten is compared with: a failure of one ends its own part of a benchmark, not the others'."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hasten.bench.engines import Engine, Generation


@dataclass(frozen=True)
class NotMeasured:
    """An engine without results, and why."""

    engine: str
    reason: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.engine} is not measured: {self.reason}"


class Peer:
    """An engine that hasten is compared with. Once it has failed it is called no more, and its results do not count."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.label, self.device, self.dtype = engine.label, engine.device, engine.dtype
        self.failure: str | None = None

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        """Continue each prompt by exactly its length; without tokens and in infinite time where the engine fails."""
        if self.failure is None:
            try:
                return self._engine.generate(prompts, lengths)
            except Exception as error:  # whatever another engine raises
                self.failure = str(error).strip().partition("\n")[0] or type(error).__name__
        return Generation([[] for _ in prompts], math.inf)


def failed(engines: Iterable[Engine]) -> list[NotMeasured]:
    """Those peers among the engines that failed."""
    return [NotMeasured(each.label, each.failure) for each in engines if isinstance(each, Peer) and each.failure]


def has_failed(engine: Engine) -> bool:
    """Whether an engine is a peer that failed."""
    return bool(failed([engine]))


def fastest(seconds: Mapping[str, float]) -> str | None:
    """Label of the peer that a speedup is quoted against: the faster of Hugging Face's, else the fastest; or none."""
    of_hugging_face = [label for label in seconds if label.startswith("HF")]
    return min(of_hugging_face or seconds, key=seconds.__getitem__, default=None)


def differing(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> int:
    """How many requests got other tokens of one engine than of another."""
    return sum(list(a) != list(b) for a, b in zip(theirs, ours, strict=True))
