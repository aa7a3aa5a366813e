"""manifest.json of a rank folder: what each file should be, checked in parallel while loading."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hasten.core.cpus import available_cpus
from hasten.core.errors import CheckpointError, ChecksumError
from hasten.core.text import from_json

MANIFEST = "manifest.json"
VERSION = 1
PIECE = 256 << 20
"""Longest run of bytes under one checksum, so that a large file is verified by several threads."""
_READ = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A run of a file's bytes and the SHA-256 of it."""

    size: int
    sha256: str


@dataclass
class Manifest:
    """Files of one rank folder, each as its pieces in order; in JSON a piece is `[size, sha256]`."""

    format: str
    ranks: int
    dtype: str
    files: dict[str, tuple[Piece, ...]] = field(default_factory=dict)

    def size(self, name: str) -> int:
        """Bytes that a file should have."""
        return sum(piece.size for piece in self.files[name])

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        known = {"version": VERSION, "format": self.format, "ranks": self.ranks, "dtype": self.dtype}
        files = (
            f"  {json.dumps(name)}: {json.dumps([[piece.size, piece.sha256] for piece in pieces])}"
            for name, pieces in sorted(self.files.items())
        )
        head = json.dumps(known, indent=1).removesuffix("\n}")
        text = f'{head},\n "files": {{\n' + ",\n".join(files) + "\n }\n}\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of `folder`, None where there is none; CheckpointError if it cannot be understood."""
        path = folder / MANIFEST
        try:
            raw = from_json(path.read_text(encoding="utf-8"))
            if raw["version"] != VERSION:
                raise CheckpointError(f"{path}: version {raw['version']} is not known; use a newer hasten")
            return cls(raw["format"], raw["ranks"], raw["dtype"], {n: _pieces(f) for n, f in raw["files"].items()})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a manifest of hasten ({error}); convert the checkpoint again"
            ) from error

    def verify(self, folder: Path, names: Iterable[str], threads: int | None = None) -> None:
        """Compare files with their checksums; ChecksumError names the first, by name, that differs."""
        jobs: list[tuple[Path, int, Piece]] = []
        for name in sorted(names):
            path = folder / name
            if name not in self.files:
                raise ChecksumError(
                    f"{path} is not in {MANIFEST}: it does not belong to this checkpoint; move it elsewhere"
                )
            self._check_size(path, name)
            offset = 0
            for piece in self.files[name]:
                jobs.append((path, offset, piece))
                offset += piece.size
        with ThreadPoolExecutor(threads or min(8, available_cpus()), "hasten-verify") as pool:
            for (path, _, _), fine in zip(jobs, pool.map(_matches, jobs), strict=True):
                if not fine:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise ChecksumError(f"{path}: its checksum differs from {MANIFEST}; copy or convert it again")

    def _check_size(self, path: Path, name: str) -> None:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, but {MANIFEST} lists it; copy or convert it again") from None
        if found != self.size(name):
            raise ChecksumError(
                f"{path}: has {found} bytes, {MANIFEST} says {self.size(name)}; copy or convert it again"
            )


def _pieces(raw: list[list[Any]]) -> tuple[Piece, ...]:
    return tuple(Piece(int(size), str(digest)) for size, digest in raw)


def _matches(job: tuple[Path, int, Piece]) -> bool:
    path, offset, piece = job
    hasher, left, buffer = hashlib.sha256(), piece.size, memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left and (count := file.readinto(buffer[: min(left, _READ)])):
            hasher.update(buffer[:count])
            left -= count
    return left == 0 and hasher.hexdigest() == piece.sha256


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class PieceHasher:
    """Checksums of bytes that pass by, cut into pieces of at most `PIECE` bytes."""

    def __init__(self, limit: int = PIECE) -> None:
        self._limit = limit
        self._hash: _Hash = hashlib.sha256()
        self._size = 0
        self._done: list[Piece] = []

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        while data:
            take = min(len(data), self._limit - self._size)
            self._hash.update(data[:take])
            self._size += take
            data = data[take:]
            if self._size == self._limit:
                self._cut()

    def _cut(self) -> None:
        self._done.append(Piece(self._size, self._hash.hexdigest()))
        self._hash, self._size = hashlib.sha256(), 0

    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of all bytes taken so far."""
        if self._size or not self._done:
            self._cut()
        return tuple(self._done)


def pieces_of(data: bytes) -> tuple[Piece, ...]:
    """The pieces of bytes that are at hand."""
    hasher = PieceHasher()
    hasher.update(memoryview(data))
    return hasher.pieces()
