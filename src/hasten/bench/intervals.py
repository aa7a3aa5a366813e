"""Confidence intervals of what is measured on texts."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964
"""Standard deviations of a 95% interval."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A range of values, such as a 95% confidence interval."""

    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """Wilson's 95% interval of a share of `total` trials, in per cent."""
    share, square = right / total, _Z * _Z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = _Z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return Interval(100 * max(0.0, middle - half), 100 * min(1.0, middle + half))


def bootstrap(differences: Sequence[float]) -> Interval:
    """The 95% interval of a mean over texts, by resampling the texts; the same for the same values."""
    if not any(differences):
        return Interval(0.0, 0.0)
    rng, count = random.Random(0), len(differences)
    means = sorted(sum(rng.choices(differences, k=count)) / count for _ in range(_RESAMPLES))
    return Interval(means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1])
