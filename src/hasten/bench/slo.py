"""A service-level objective: limits of latencies, judged at the 95th percentile or request by request."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hasten.core.errors import ConfigError

NAMES = ("ttft", "itl", "tpot", "e2el")
"""Latencies that may have a limit, under the names of `hasten bench load`."""
REQUEST_NAMES = ("ttft", "tpot", "e2el")
"""Those of which each request has a single value."""
FORM = "NAME=TIME,… with times in ms or s, such as {0}=300ms,{1}=40ms, or NAME:MILLISECONDS …, such as {0}:300 {1}:40"
_PART = re.compile(r"(?P<name>\w+)(=(?P<time>[^=:]+?)(?P<unit>ms|s)|:(?P<milliseconds>[^=:]+))")
_SEPARATOR = re.compile(r"\s*,\s*|\s+")


@dataclass(frozen=True)
class Slo:
    """Limits in milliseconds by the name of the latency."""

    limits: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, names: Sequence[str] = NAMES) -> "Slo":
        """From a text such as `ttft=300ms,itl=40ms` or `ttft:300 itl:40`; ConfigError names the part that is wrong."""
        limits: dict[str, float] = {}
        for part in _SEPARATOR.split(text.strip()):
            name, limit = _limit(part)
            if name not in names or limit is None:
                form = FORM.format(*names)
                raise ConfigError(f"{part!r} is not a limit of a latency ({', '.join(names)}); write {form}")
            if name in limits:
                raise ConfigError(f"{text!r} limits {name} twice")
            limits[name] = limit
        return cls(limits)

    def __str__(self) -> str:
        return ",".join(f"{name}={limit:g}ms" for name, limit in self.limits.items())

    def met_by_request(self, latencies: Mapping[str, float | None]) -> bool:
        """Whether a request's own latencies, in milliseconds, are within their limits; None is within each."""
        values = ((latencies[name], limit) for name, limit in self.limits.items())
        return all(value is None or value <= limit for value, limit in values)


def _limit(part: str) -> tuple[str, float | None]:
    """The name of a latency and its limit in milliseconds, None where there is none that can be kept."""
    found = _PART.fullmatch(part)
    if found is None:
        return "", None
    try:
        limit = float(found["time"] or found["milliseconds"]) * (1000 if found["unit"] == "s" else 1)
    except ValueError:
        return found["name"], None
    return found["name"], limit if 0 < limit < float("inf") else None
