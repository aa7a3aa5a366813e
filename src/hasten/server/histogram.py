"""Counts of values by how large they are."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field


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
