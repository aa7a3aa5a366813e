"""Weights read to a GPU by its driver's own API, which needs no torch: while that is imported, or afterwards.

Threads read a checkpoint's files into page-locked memory, from which the driver copies them: from mapped files each
page would be waited for. Each read and each call of the driver releases Python's lock, which the imports want. What
keeps all this from working, such as too little memory, is no error: what did not arrive is read by torch.
"""

import ctypes
import itertools
import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hasten.core.config import EngineConfig
from hasten.core.text import from_json

_log = logging.getLogger(__name__)

_READERS = 4
_PIECE = 32 << 20
"""Bytes that a reader reads and copies at a time; it has two such buffers in turn."""
_SWITCH_S = 0.0005
"""How soon Python's lock goes to a reader that wants it, for microseconds: by default that takes ten times as long."""
_ALIGNMENT = 512
"""Bytes; kernels read weights faster at aligned addresses, which safetensors does not give them."""
_LARGE = 1 << 20
"""Bytes from which a tensor has memory of its own, which is free again once the tensor is not needed."""
_LARGEST_SHARE = 0.8
"""Of a GPU's free memory that the files may take: the rest is for what comes of them."""
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_HEADER = 100 << 20
"""Bytes of a header, as safetensors limits it."""


class Driver(Protocol):
    """What of a GPU's driver is needed here. Addresses are numbers; OSError where a call fails."""

    def enter(self) -> None:
        """Let this thread work with the GPU, in the context that torch uses."""

    def free_bytes(self) -> int:
        """Memory that is left."""

    def allocate(self, nbytes: int) -> int:
        """Memory of the GPU."""

    def free(self, address: int) -> None:
        """Give memory back; the GPU has done by then what it was to do with it."""

    def page_locked(self, nbytes: int) -> int:
        """Memory of the host that the GPU reads."""

    def free_page_locked(self, address: int) -> None:
        """Give such memory back."""

    def stream(self) -> Any:
        """A queue of copies."""

    def free_stream(self, stream: Any) -> None:
        """Give a queue back."""

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Begin to copy from the host to the GPU."""

    def wait(self, stream: Any) -> None:
        """Wait until the copies of a queue are done."""


class CudaDriver:
    """CUDA's driver, initialized, with the GPU of this number."""

    def __init__(self, number: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._context, device = ctypes.c_void_p(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), number)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise OSError(f"{name}: CUDA error {code}")

    def _address(self, name: str, *arguments: Any) -> int:
        result = ctypes.c_uint64()
        self._call(name, ctypes.byref(result), *arguments)
        return result.value

    def enter(self) -> None:
        """See Driver."""
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """See Driver."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        """See Driver."""
        return self._address("cuMemAlloc_v2", ctypes.c_size_t(nbytes))

    def free(self, address: int) -> None:
        """See Driver."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def page_locked(self, nbytes: int) -> int:
        """See Driver."""
        return self._address("cuMemHostAlloc", ctypes.c_size_t(nbytes), 0)

    def free_page_locked(self, address: int) -> None:
        """See Driver."""
        self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def stream(self) -> Any:
        """See Driver."""
        handle = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(handle), 1)  # waits for no other stream
        return handle

    def free_stream(self, stream: Any) -> None:
        """See Driver."""
        self._call("cuStreamDestroy_v2", stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """See Driver."""
        arguments = (ctypes.c_uint64(target), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), stream)
        self._call("cuMemcpyHtoDAsync_v2", *arguments)

    def wait(self, stream: Any) -> None:
        """See Driver."""
        self._call("cuStreamSynchronize", stream)


@dataclass
class _Buffer:
    """Page-locked memory of a reader."""

    address: int
    stream: Any
    piece: "_Piece | None" = None
    """What the driver copies from it."""


class DeviceMemory:
    """Memory of a GPU, for as long as anything refers to it."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver = driver
        self.address = driver.allocate(nbytes)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # it was not allocated, or the process ends
            self._driver.free(self.address)


@dataclass(frozen=True)
class Arrived:
    """A tensor's bytes in memory of a GPU, which `torch.as_tensor` gives a tensor of, without a copy."""

    memory: DeviceMemory
    offset: int
    nbytes: int
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        """Where they begin."""
        return self.memory.address + self.offset

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


class _Entry(NamedTuple):
    """What a file's header says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Where its bytes begin, behind the header."""
    nbytes: int


class _File(NamedTuple):
    """A file whose header is read."""

    path: str
    descriptor: int
    state: tuple[int, ...]
    begin: int
    """Where the header ends."""
    entries: list[_Entry]

    @classmethod
    def opened(cls, path: Path) -> "_File":
        """OSError, ValueError, KeyError or TypeError where it is no such file."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if length > _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = from_json(os.pread(descriptor, length, 8))
            header.pop("__metadata__", None)
            entries = [
                _Entry(name, entry["dtype"], tuple(entry["shape"]), first, end - first)
                for name, entry in header.items()
                for first, end in [entry["data_offsets"]]
            ]
        except BaseException:
            os.close(descriptor)
            raise
        return cls(str(path), descriptor, _state(path), 8 + length, entries)


class _Piece(NamedTuple):
    """Bytes of a tensor in a file, and where they go."""

    tensor: "_Coming"
    descriptor: int
    offset: int
    nbytes: int
    target: int


class _Coming:
    """A tensor of which pieces are still to come."""

    def __init__(self) -> None:
        self.pieces = 0
        """How many."""


class GpuWeights:
    """The tensors of some safetensors files on their way to a GPU, in the order of the files."""

    def __init__(self, files: Sequence[Path], driver: Driver, number: int = 0) -> None:
        """Begin to read them to this GPU. OSError, ValueError, KeyError or TypeError where that cannot be."""
        self._driver = driver
        self.number = number
        """Of the GPU."""
        self._coming: dict[tuple[str, str], tuple[_Coming, Arrived]] = {}
        self._pieces: list[_Piece] = []
        self._changed = threading.Condition()
        self._failed = False
        driver.enter()
        self._files: list[_File] = []
        try:
            for path in files:
                self._files.append(_File.opened(path))
            total = sum(entry.nbytes for file in self._files for entry in file.entries)
            if total > driver.free_bytes() * _LARGEST_SHARE:
                raise OSError(f"{total} bytes are more than the GPU has room for")
            for file in self._files:
                self._allocate(file)
        except BaseException:
            self._close()
            raise
        self._states = {file.path: file.state for file in self._files}
        self._next = itertools.count()
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._readers = [threading.Thread(target=self._read, name="weights", daemon=True) for _ in range(_READERS)]
        for reader in self._readers:
            reader.start()

    def _close(self) -> None:
        while self._files:
            os.close(self._files.pop().descriptor)

    def _allocate(self, file: _File) -> None:
        """Memory for the tensors of a file, and the pieces that they are read in."""
        small = [entry for entry in file.entries if entry.nbytes < _LARGE]
        *offsets, total = itertools.accumulate((-(-each.nbytes // _ALIGNMENT) for each in small), initial=0)
        shared = DeviceMemory(self._driver, max(total, 1) * _ALIGNMENT) if small else None
        starts = {entry.name: offset * _ALIGNMENT for entry, offset in zip(small, offsets, strict=True)}
        for entry in sorted(file.entries, key=lambda entry: entry.begin):
            own = shared if entry.name in starts else None
            memory = own or DeviceMemory(self._driver, entry.nbytes)
            arrived = Arrived(memory, starts.get(entry.name, 0), entry.nbytes, entry.dtype, entry.shape)
            coming = _Coming()
            self._coming[file.path, entry.name] = coming, arrived
            for at in range(0, entry.nbytes, _PIECE):
                nbytes = min(_PIECE, entry.nbytes - at)
                offset = file.begin + entry.begin + at
                self._pieces.append(_Piece(coming, file.descriptor, offset, nbytes, arrived.address + at))
                coming.pieces += 1

    def _read(self) -> None:
        """What each reader does: pieces, until none is left."""
        buffers: list[_Buffer] = []
        try:
            self._driver.enter()
            buffers += (_Buffer(self._driver.page_locked(_PIECE), self._driver.stream()) for _ in range(2))
            for buffer in itertools.cycle(buffers):
                self._empty(buffer)
                number = next(self._next)
                if self._failed or number >= len(self._pieces):
                    break
                self._fetch(self._pieces[number], buffer)
            for buffer in buffers:
                self._empty(buffer)
        except OSError as error:
            _log.debug("weights cannot be read to the GPU directly: %s", error)
            self._fail()
        finally:
            with suppress(OSError):
                for buffer in buffers:
                    self._driver.wait(buffer.stream)
                    self._driver.free_stream(buffer.stream)
                    self._driver.free_page_locked(buffer.address)

    def _fail(self) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def _empty(self, buffer: "_Buffer") -> None:
        """Wait until the GPU has what a buffer had."""
        piece, buffer.piece = buffer.piece, None
        if piece is None:
            return
        self._driver.wait(buffer.stream)
        with self._changed:
            piece.tensor.pieces -= 1
            if piece.tensor.pieces == 0:
                self._changed.notify_all()

    def _fetch(self, piece: _Piece, buffer: "_Buffer") -> None:
        memory = memoryview((ctypes.c_char * piece.nbytes).from_address(buffer.address)).cast("B")
        done = 0
        while done < piece.nbytes:
            count = os.preadv(piece.descriptor, [memory[done:]], piece.offset + done)
            if count == 0:
                raise OSError("the file has become shorter")
            done += count
        self._driver.copy(piece.target, buffer.address, piece.nbytes, buffer.stream)
        buffer.piece = piece

    def take(self, path: Path, name: str) -> Arrived | None:
        """A tensor of a file, once it has arrived, and only once; None where there is none, or reading failed.

        The file must be as it was when reading began.
        """
        if self._states.get(str(path)) != _state(path) or (str(path), name) not in self._coming:
            return None
        coming, arrived = self._coming[str(path), name]
        with self._changed:
            self._changed.wait_for(lambda: self._failed or coming.pieces == 0)
        if coming.pieces:
            return None  # something may still be written there: it goes at the end
        del self._coming[str(path), name]
        return arrived

    def end(self) -> None:
        """Let go of what was not taken, once nothing is written to it any more."""
        self._fail()
        for reader in self._readers:
            reader.join()
        if self._files:
            self._close()
            sys.setswitchinterval(self._interval)
        self._coming.clear()
        self._pieces.clear()


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew; nothing where it is missing, which is for its reader to say."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def folder_of(config: EngineConfig) -> Path | None:
    """The folder whose safetensors files an engine that this process alone computes needs whole on its first GPU."""
    folder = Path(config.model)
    alone = config.parallel.ranks == 1 and config.load_format == "auto" and config.device in ("auto", "cuda", "cuda:0")
    if not alone or not any((folder / name).is_file() for name in (_FILE, _INDEX)):
        return None
    with suppress(OSError, ValueError, TypeError):
        # quantized weights are put together from several tensors, on the CPU
        return None if "quantization_config" in from_json((folder / "config.json").read_text()) else folder
    return None


def begun(files: Sequence[Path], number: int) -> GpuWeights | None:
    """Begin to read files to the GPU of this number; None where that cannot be. CUDA's driver is initialized."""
    try:
        return GpuWeights(files, CudaDriver(number), number)
    except (OSError, AttributeError, ValueError, KeyError, TypeError) as error:
        _log.debug("weights are not read to GPU %d directly: %s", number, error)
        return None


class Begun:
    """What a thread of this process has begun to read before torch is there, or is about to."""

    def __init__(self) -> None:
        self._is_known = threading.Event()
        self._is_known.set()
        self._weights: GpuWeights | None = None

    def expect(self) -> None:
        """A thread is about to call `begin` or `give_up`, and `take` waits for it."""
        self._is_known.clear()

    def begin(self, folder: Path) -> None:
        """Begin to read the weights of a folder to the first GPU; CUDA's driver is initialized."""
        try:
            self._weights = begun(_files(folder), 0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.debug("%s: %s", folder, error)
        finally:
            self._is_known.set()

    def give_up(self) -> None:
        """Nothing is begun."""
        self._is_known.set()

    def take(self) -> GpuWeights | None:
        """What was begun, for who takes it; nothing is left here."""
        self._is_known.wait()
        weights, self._weights = self._weights, None
        return weights


BEGUN = Begun()
"""That of this process."""


def _files(folder: Path) -> list[Path]:
    """The files that hold a model's weights."""
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    names = from_json((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]
