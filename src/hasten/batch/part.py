"""A part of a batch, which a process computes on its own: every N-th row of the input."""

import re
from dataclasses import dataclass
from pathlib import Path

from hasten.batch.folder import JOB, has_rows
from hasten.core.errors import ConfigError

_FOLDER = re.compile(r"part-\d{5,}-of-(\d{5,})")
_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Part:
    """The rows whose numbers leave the remainder `index` when they are divided by `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `INDEX/COUNT`, counted from 0; ConfigError for anything else."""
        found = _PART.fullmatch(text)
        if found is None or not int(found[1]) < int(found[2]):
            raise ConfigError(
                f"part {text!r:.80} is not INDEX/COUNT, such as 0/8 for the first of eight and 7/8 for the last"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def is_whole(self) -> bool:
        """Whether it has all rows."""
        return self.count == 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, number: int) -> bool:
        """Whether a row is one of its rows."""
        return number % self.count == self.index

    def folder(self, output: Path) -> Path:
        """Its folder within the batch's; ConfigError where that has results of the whole, or of other parts."""
        others = {int(found[1]) for path in output.glob("part-*") if (found := _FOLDER.fullmatch(path.name))}
        if self.is_whole and not others:
            return output
        if (output / JOB).exists() and has_rows(output):
            raise ConfigError(f"{output} has the results of a whole batch; give another folder for its parts")
        if others - {self.count}:
            counts = ", ".join(map(str, sorted(others)))
            raise ConfigError(
                f"{output} has parts of {counts}, not of {self.count}: rows would be done twice; give another folder"
            )
        return output / f"part-{self.index:05d}-of-{self.count:05d}"
