"""Counts of values by how large they are."""

from bisect import bisect_left
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

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
