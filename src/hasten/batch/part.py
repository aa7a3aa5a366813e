"""A part of a batch, which a process computes on its own: every N-th row of the input."""

import re
from dataclasses import dataclass
from pathlib import Path

from hasten.batch.folder import JOB
from hasten.core.errors import ConfigError

_FOLDER = re.compile(r"part-\d{5,}-of-(\d{5,})")


@dataclass(frozen=True)
class Part:
    """The rows whose numbers leave the remainder `index` when they are divided by `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `INDEX/COUNT`, counted from 0; ConfigError for anything else."""
        index, slash, count = text.partition("/")
        numbers = [int(number) for number in (index, count) if number.isascii() and number.isdecimal()]
        if not slash or len(numbers) != 2 or not numbers[0] < numbers[1]:
            raise ConfigError(
                f"part {text!r} is not INDEX/COUNT, such as 0/8 for the first of eight and 7/8 for the last"
            )
        return cls(*numbers)

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
        if (output / JOB).exists():
            raise ConfigError(f"{output} has the results of a whole batch; give another folder for its parts")
        if others - {self.count}:
            counts = ", ".join(map(str, sorted(others)))
            raise ConfigError(
                f"{output} has parts of {counts}, not of {self.count}: rows would be done twice; give another folder"
            )
        return output / f"part-{self.index:05d}-of-{self.count:05d}"
