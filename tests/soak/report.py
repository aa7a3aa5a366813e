"""What a soak found: figures, and what is not as it must be."""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_LEAKS = re.compile(
    r"Traceback|File \"|0x[0-9a-f]{6,}|/(tmp|home|root|usr|work|proc|opt)/|site-packages|\.py\b|hasten\.(server|engine)"
)


def leak(text: str) -> str:
    """What an answer to a client must not have: a path of the machine, an address in memory, a part of a traceback."""
    found = _LEAKS.search(text)
    return "" if found is None else found[0]


@dataclass
class Report:
    """Of one soak. It has passed if there are no failures."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def require(self, condition: bool, otherwise: str) -> None:
        """Note a failure unless something is so."""
        if not condition:
            self.failures.append(otherwise)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Keep a figure, which must not be above a limit."""
        self.figures[name] = round(value, 4)
        self.require(value <= limit, f"{name} is {value:.4g}, the limit is {limit:g}")

    def tell(self) -> int:
        """Print it as JSON; returns the exit status."""
        found = {"soak": self.name, "passed": not self.failures, "figures": self.figures, "failures": self.failures}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 1 if self.failures else 0


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    fields = {"p50": statistics.median(seconds), "p99": quantile(seconds, 0.99), "max": max(seconds)}
    return {name: round(1000 * value, 1) for name, value in fields.items()}
