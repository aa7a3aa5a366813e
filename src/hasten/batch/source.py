"""The input of a batch: rows of JSON or of a Parquet file, read one by one however many there are."""

import codecs
import hashlib
import stat
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from hasten.batch.part import Part
from hasten.core.errors import ConfigError
from hasten.core.files import reading

_PARQUET = b"PAR1"
"""First bytes of a Parquet file."""
_OTHER_FORMATS = {
    **{b"\x1f\x8b": "compressed by gzip", b"PK\x03\x04": "a ZIP archive"},
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}
"""First bytes of what is not read, and what it is."""


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    number: int
    """Its line in the file, or its row, from 0 on."""
    text: bytes
    """Its JSON."""
    unit: str = "line"

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"{self.unit} {self.number + 1}"


class _Ids(msgspec.Struct):
    custom_id: str | int | None = None
    id: str | int | None = None


_decode_ids = msgspec.json.Decoder(_Ids).decode


def id_of(row: Row) -> str:
    """What a row is called: its `custom_id`, else its `id`, else `row-LINE`, which also stands for what is no JSON."""
    try:
        ids = _decode_ids(row.text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        ids = _Ids()
    given = ids.id if ids.custom_id is None else ids.custom_id
    return f"row-{row.number + 1}" if given is None else str(given)


class Source(ABC):
    """A file of rows, which may be read more than once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows in order; ConfigError where the file cannot be read."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        with reading(f"rows from {self.path}"), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def open_rows(path: Path) -> Source:
    """The rows of a file of JSON lines or, as its first bytes say, a Parquet file; ConfigError for a pipe."""
    with reading(f"rows from {path}"):
        mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{path} can only be read once, and rows are read several times: write them to a file first")
    with reading(f"rows from {path}"), path.open("rb") as file:
        beginning = file.read(len(_PARQUET))
    if beginning == _PARQUET:
        from hasten.batch.parquet import Parquet

        return Parquet(path)
    kind = next((kind for mark, kind in _OTHER_FORMATS.items() if beginning.startswith(mark)), None)
    if kind is not None:
        raise ConfigError(f"{path} is {kind}; give a Parquet file, or one in UTF-8 with one JSON object per line")
    return JsonLines(path)


class JsonLines(Source):
    """A file with one JSON object per line; blank lines are no rows."""

    def rows(self) -> Iterator[Row]:
        """The rows in order; ConfigError where the file cannot be read."""
        with reading(f"rows from {self.path}"), self.path.open("rb") as file:
            for number, line in enumerate(file):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
                if not text.isspace():
                    yield Row(number, text)


@dataclass(frozen=True)
class RowIndex:
    """What is known of an input before its first row is computed. Takes memory for no text of it."""

    rows: int
    """Of the part that is computed."""
    size: int
    """Above the number of every row."""
    repeated: frozenset[int]
    """Numbers of rows whose id an earlier row has."""

    @classmethod
    def of(cls, source: Source, part: Part) -> "RowIndex":
        """Read all ids once, and a second time those of rows that may be repeated."""
        hashes, last, own = array("q"), -1, 0
        for row in source.rows():
            hashes.append(hash(id_of(row)))
            last = row.number
            own += part.has(last)
        if last < 0:
            raise ConfigError(f"{source.path} has no rows; give a Parquet file, or one with one JSON object per line")
        ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
        suspects = frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        return cls(own, last + 1, _repeated(source, suspects) if suspects else frozenset())


def _repeated(source: Source, suspects: frozenset[int]) -> frozenset[int]:
    """Numbers of rows whose id an earlier row has, where ids with these hashes occur more than once."""
    seen, found = set[str](), set[int]()
    for row in source.rows():
        name = id_of(row)
        if hash(name) in suspects:
            (found.add(row.number) if name in seen else seen.add(name))
    return frozenset(found)
