"""Arrival times of an open-loop load: when each request is due, whatever became of those before it."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from hasten.core.errors import ConfigError

AT_ONCE = math.inf
"""The rate of requests that are all due at the start."""


def rate_of(text: str) -> float:
    """Requests per second from text: a number above 0, or `inf`."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ConfigError(f"{text!r} is not a rate: a number of requests per second above 0, or inf")
    return rate


def arrival_times(rate: float, process: str, rng: random.Random) -> Iterator[float]:
    """Seconds after the start at which requests are due, without end; the first is due at 0.

    Between two of them are exponentially distributed times where the process is `poisson`, or always the same.
    """
    if rate == AT_ONCE:
        return itertools.repeat(0.0)
    gaps = (rng.expovariate(rate) if process == "poisson" else 1 / rate for _ in itertools.count())
    return itertools.accumulate(gaps, initial=0.0)


def at_rate(times: Sequence[float], rate: float) -> list[float]:
    """The arrival times of a trace, stretched so that requests arrive at a mean rate; their bursts stay."""
    if rate == AT_ONCE:
        return [0.0] * len(times)
    span = times[-1] - times[0]
    if span <= 0:
        raise ConfigError("the trace's requests all have the same timestamp: no request rate can be given to them")
    factor = (len(times) - 1) / rate / span
    return [(time - times[0]) * factor for time in times]
