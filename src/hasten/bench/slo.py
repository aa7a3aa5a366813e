"""A service-level objective: limits of latencies that a served model keeps at the 95th percentile."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.bench.load.metrics import LoadResult
from hasten.core.errors import ConfigError

NAMES = ("ttft", "itl", "tpot", "e2el")
"""Latencies that may have a limit, under the names of `hasten bench load`."""
FORM = "NAME=TIME,… with names of " + ", ".join(NAMES) + " and times in ms or s, such as ttft=300ms,itl=40ms"
_PART = re.compile(r"(?P<name>\w+)=(?P<number>\d+(\.\d+)?)(?P<unit>ms|s)")


@dataclass(frozen=True)
class Slo:
    """Limits in milliseconds by the name of the latency."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """From a text such as `ttft=300ms,itl=40ms`; ConfigError names the part that is wrong."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            found = _PART.fullmatch(part.strip())
            if found is None or found["name"] not in NAMES or float(found["number"]) == 0:
                raise ConfigError(f"{part!r} is not a limit of a latency; write {FORM}")
            if found["name"] in limits:
                raise ConfigError(f"{text!r} limits {found['name']} twice")
            limits[found["name"]] = float(found["number"]) * (1000 if found["unit"] == "s" else 1)
        return cls(limits)

    def __str__(self) -> str:
        return ",".join(f"{name}={limit:g}ms" for name, limit in self.limits.items())

    def met_by(self, result: LoadResult) -> bool:
        """Whether no request failed and the 95th percentile of each limited latency is within its limit."""
        return not result.failed and all(
            latency is not None and latency.p95 <= limit
            for latency, limit in ((getattr(result, name), limit) for name, limit in self.limits.items())
        )
