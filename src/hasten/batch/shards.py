"""Output files of a batch: each appears whole, and nothing that was written is computed again.

Lines go to a journal (`.NAME.partial`), one write each, so that a process that is killed leaves whole lines and at most
a part of one. A journal with enough lines becomes the next shard (`NAME-00000.jsonl`) by being renamed. A row is found
by the number in its line's `id`, so the files themselves say what is done.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from hasten.core.errors import ConfigError
from hasten.core.files import naming, reading

REQUEST_PREFIX = "batch_req_"
_ID = re.compile(REQUEST_PREFIX + r"([0-9]{1,18})")


class _Line(msgspec.Struct):
    id: str


_decode_line = msgspec.json.Decoder(_Line).decode


def _number(line: bytes) -> int | None:
    """The row that a line is about; None for a line that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        name = _decode_line(line).id
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    found = _ID.fullmatch(name)
    return None if found is None else int(found[1])


class ShardWriter:
    """One kind of output in a folder, `results` or `errors`; a context manager that closes its journal."""

    def __init__(self, folder: Path, name: str, rows_per_shard: int) -> None:
        self._folder = folder
        self._name = name
        self._rows_per_shard = rows_per_shard
        self._journal = folder / f".{name}.partial"
        self._next = max((_shard_number(shard) for shard in self.shards()), default=-1) + 1
        self._file: int | None = None
        self._rows = 0
        """In the journal."""

    def shards(self) -> list[Path]:
        """Complete files, in order."""
        found = (path for path in self._folder.glob(f"{self._name}-*.jsonl") if _shard_number(path) >= 0)
        return sorted(found, key=_shard_number)

    def recover(self) -> Iterator[int]:
        """The row of each line that an earlier process has written; the end of its last line that is not whole goes."""
        for shard in self.shards():
            yield from self._shard_rows(shard)
        yield from self._journal_rows()

    def _shard_rows(self, shard: Path) -> Iterator[int]:
        with reading(f"results from {shard}"), shard.open("rb") as file:
            for line in file:
                number = _number(line)
                if number is None:
                    raise ConfigError(f"{shard} is damaged: it has a line that no batch writes; give another folder")
                yield number

    def _journal_rows(self) -> Iterator[int]:
        whole = self._rows = 0
        with suppress(FileNotFoundError), self._journal.open("rb") as file:
            for line in file:
                number = _number(line)
                if number is None:
                    break
                whole += len(line)
                self._rows += 1
                yield number
        if self._journal.exists():
            os.truncate(self._journal, whole)

    def discard(self) -> None:
        """Remove all of its files."""
        for path in (*self.shards(), self._journal):
            path.unlink(missing_ok=True)
        self._rows = 0

    def write(self, line: bytes) -> None:
        """Add a line, which is in the file when this returns."""
        with naming(self._journal):
            if self._file is None:
                self._file = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self._rows += 1
        if self._rows >= self._rows_per_shard:
            self.seal()

    def seal(self) -> None:
        """Make a shard of what the journal has, which survives a failure of the machine from then on."""
        self._close()
        with naming(self._journal):
            if self._rows == 0:
                self._journal.unlink(missing_ok=True)
                return
            _sync(self._journal)
            self._journal.rename(self._folder / f"{self._name}-{self._next:05d}.jsonl")
            _sync(self._folder)
        self._next += 1
        self._rows = 0

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()


def _shard_number(path: Path) -> int:
    found = re.fullmatch(r"\w+-(\d{5,})\.jsonl", path.name)
    return -1 if found is None else int(found[1])


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
