"""Distributions of lengths in tokens: fixed, uniform, lognormal."""

import math
import random
import re
from dataclasses import dataclass

from hasten.core.errors import ConfigError

_RANGE = re.compile(r"(\d+):(\d+)")
_NUMBER = r"(\d+(?:\.\d+)?)"
_LOGNORMAL = re.compile(rf"lognormal:{_NUMBER},{_NUMBER}(?:,(\d+))?")
FORMS = "N, LOW:HIGH, or lognormal:MEAN,STDDEV[,MAX]"


@dataclass(frozen=True)
class Lengths:
    """A distribution of whole numbers of at least 1.

    With a `deviation` it is lognormal, with that mean and standard deviation before it is cut at `high`; otherwise it
    is uniform from `low` to `high`, both included.
    """

    low: int = 1
    high: int | None = None
    mean: float = 0.0
    deviation: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """From `128`, `32:512`, `lognormal:200,100` or `lognormal:200,100,1024`; ConfigError for anything else."""
        if text.isdecimal() and int(text) > 0:
            return cls(int(text), int(text))
        if (found := _RANGE.fullmatch(text)) and 0 < int(found[1]) <= int(found[2]):
            return cls(int(found[1]), int(found[2]))
        if (found := _LOGNORMAL.fullmatch(text)) and float(found[1]) >= 1 and found[3] != "0":
            high = None if found[3] is None else int(found[3])
            return cls(high=high, mean=float(found[1]), deviation=float(found[2]))
        raise ConfigError(f"{text!r} is not a length in tokens: give {FORMS}, with lengths of at least 1")

    def draw(self, rng: random.Random) -> int:
        """A length."""
        if self.deviation is None:
            return self.low if self.low == self.high else rng.randint(self.low, self.high or self.low)
        variance = math.log1p((self.deviation / self.mean) ** 2)
        drawn = round(rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance)))
        return max(self.low, drawn if self.high is None else min(drawn, self.high))
