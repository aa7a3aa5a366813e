"""What an instance wrote: NAME.log holds its bytes as they came, NAME.times when they came.

NAME.times is pairs of big-endian 64-bit numbers: nanoseconds since 1970, and an offset in NAME.log. A line's time is
that of the last pair at or before its first byte. So nothing is added to the output or taken from it, whatever bytes it
has, and a line that is written in parts has the time of its first part. What a full disk does not take is lost.
"""

import os
import struct
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from hasten.cluster.backend import LogOptions

_PAIR = struct.Struct(">QQ")
_BLOCK = 1 << 16
_WAIT_S = 0.1


class LogWriter:
    """Keeps what one instance writes; a later start of it goes on in the same files."""

    def __init__(self, folder: Path, instance: str) -> None:
        self._log = (folder / f"{instance}.log").open("ab", buffering=0)
        self._index = (folder / f"{instance}.times").open("ab", buffering=0)
        self._size = self._log.tell()
        self._new_line = True
        self.lost = 0
        """Bytes that could not be written."""
        self.error = ""
        """Why the last of them could not."""

    def write(self, data: bytes) -> None:
        """Append some bytes; those that a full disk does not take are lost, and whoever wrote them goes on."""
        start = 0 if self._new_line else data.find(b"\n") + 1
        begins = start < len(data) and (self._new_line or start > 0)
        self._new_line = data.endswith(b"\n")
        rest = memoryview(data)
        try:
            if begins:
                # first the time: so a reader never meets a line that has none
                self._add_time(self._size + start)
            while rest:
                written = self._log.write(rest)
                self._size += written
                rest = rest[written:]
        except OSError as error:
            self.lost += len(rest)
            self.error = error.strerror or str(error)

    def _add_time(self, offset: int) -> None:
        end = self._index.seek(0, os.SEEK_END)
        if self._index.write(_PAIR.pack(time.time_ns(), offset)) < _PAIR.size:
            self._index.truncate(end)  # or no later pair would be where it is looked for

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._index.close()


class LogReader:
    """Reads lines while they may still be written."""

    def __init__(self, folder: Path, instance: str, ended: Callable[[], bool]) -> None:
        self._log = folder / f"{instance}.log"
        self._index = folder / f"{instance}.times"
        self._ended = ended

    def lines(self, options: "LogOptions") -> Iterator[str]:
        """The lines that are asked for; with `follow`, until the instance has ended.

        Bytes that are no UTF-8 are shown as replacement characters.
        """
        if options.follow:
            while not self._log.exists() and not self._ended():
                time.sleep(_WAIT_S)
        try:
            log = self._log.open("rb")
        except FileNotFoundError:
            return
        with log:
            start = max(self._offset_since(options), _offset_of_tail(log, options.tail))
            times = _Times(self._index) if options.timestamps else None
            for offset, line in self._raw(log, start, options.follow):
                text = line.removesuffix(b"\n").decode(errors="replace")
                yield text if times is None else f"{times.of(offset)} {text}"

    def _raw(self, log: BinaryIO, start: int, follow: bool) -> Iterator[tuple[int, bytes]]:
        """Lines with their offsets; the last one may lack its end."""
        log.seek(start)
        held = b""
        while True:
            ended = not follow or self._ended()
            while part := log.readline():
                held += part
                if held.endswith(b"\n"):
                    yield start, held
                    start, held = start + len(held), b""
            if ended:
                break
            time.sleep(_WAIT_S)
        if held:
            yield start, held

    def _offset_since(self, options: "LogOptions") -> int:
        """Where the first line begins that came since the time asked for."""
        bounds = [] if options.since is None else [time.time() - options.since]
        if options.since_time is not None:
            bounds.append(options.since_time.timestamp())
        if not bounds:
            return 0
        times, offsets = _pairs(self._index)
        index = bisect_left(times, int(max(bounds) * 1e9))
        return offsets[index] if index < len(offsets) else self._log.stat().st_size


class _Times:
    """Times of lines, read again when a line is newer than all that is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = -1
        self._times: list[int] = []
        self._offsets: list[int] = []

    def of(self, offset: int) -> str:
        """When the line at an offset began, as RFC 3339."""
        if not self._offsets or offset > self._offsets[-1]:
            size = self._path.stat().st_size
            if size != self._size:
                self._size = size
                self._times, self._offsets = _pairs(self._path)
        index = max(0, bisect_right(self._offsets, offset) - 1)
        nanoseconds = self._times[index] if self._times else 0
        moment = datetime.fromtimestamp(nanoseconds // 10**9, UTC)
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds % 10**9:09d}Z"


def _pairs(path: Path) -> tuple[list[int], list[int]]:
    """Times and offsets; a pair that is being written is left out."""
    data = path.read_bytes()
    pairs = list(_PAIR.iter_unpack(data[: len(data) // _PAIR.size * _PAIR.size]))
    return [moment for moment, _ in pairs], [offset for _, offset in pairs]


def _offset_of_tail(log: BinaryIO, count: int) -> int:
    """Where the last `count` lines begin; less than 0 is all."""
    if count < 0:
        return 0
    end = position = log.seek(0, os.SEEK_END)
    if count == 0:
        return end
    wanted = count
    while position > 0:
        size = min(_BLOCK, position)
        position -= size
        log.seek(position)
        block = log.read(size)
        if position + size == end and block.endswith(b"\n"):
            wanted += 1
        found = block.count(b"\n")
        if found >= wanted:
            cut = len(block)
            for _ in range(wanted):
                cut = block.rindex(b"\n", 0, cut)
            return position + cut + 1
        wanted -= found
    return 0
