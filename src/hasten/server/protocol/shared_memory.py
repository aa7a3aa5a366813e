"""System shared memory that clients register, so that tensors need not travel; and what clients want done with outputs.

A region is a part of a POSIX shared memory object. It is read and written with pread and pwrite and never mapped: a
client that shrinks its object cannot crash the server, and what was checked is what is used. CUDA shared memory is not
offered.
"""

import os
import stat
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hasten.server.inflight import Claim
from hasten.server.options import SecurityOptions
from hasten.server.protocol.tensors import to_bytes
from hasten.server.types import ErrorKind, InferResponse, Parameter, RequestedOutput, ServiceError, Tensor, invalid

FOLDER = Path("/dev/shm")
REGION, BYTE_SIZE, OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
MAX_REGIONS = 512
"""Each takes a file descriptor."""
_LONGEST_NAME = 256
_T = TypeVar("_T", str, int)
_OFF = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
"""Triton's text."""
NO_CUDA = "CUDA shared memory is not supported; use system shared memory or send the tensors"


@dataclass(frozen=True)
class Region:
    """A registered part of an object, in bytes."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int


@dataclass(frozen=True)
class Slice:
    """A part of a region that one tensor lives in. The region stays open for it, also when it is unregistered."""

    region: Region
    offset: int
    """From the beginning of the region."""
    byte_size: int

    def read(self) -> bytes:
        """The bytes; INVALID where the client has shrunk its object."""
        raw = os.pread(self.region.descriptor, self.byte_size, self.region.offset + self.offset)
        if len(raw) < self.byte_size:
            raise _beyond(self.region.name)
        return raw

    def write(self, output: str, raw: bytes) -> None:
        """Write a result; INTERNAL where it needs more room."""
        if len(raw) > self.byte_size:
            raise ServiceError(
                ErrorKind.INTERNAL,
                f"shared memory size specified with the request for output '{output}' ({self.byte_size} bytes) should "
                f"be at least {len(raw)} bytes to hold the results",
            )
        at = self.region.offset + self.offset
        if os.fstat(self.region.descriptor).st_size < at + len(raw):
            raise _beyond(self.region.name)
        os.pwrite(self.region.descriptor, raw, at)


def _beyond(name: str) -> ServiceError:
    return invalid(f"Invalid offset + byte size for shared memory region: '{name}'")


class SharedMemory:
    """The regions that clients registered."""

    def __init__(
        self,
        *,
        allowed: bool = SecurityOptions.allow_client_shm,
        max_request_bytes: int = SecurityOptions.max_request_bytes,
    ) -> None:
        self._allowed = allowed
        self._max_request_bytes = max_request_bytes
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Take a region under a name; ALREADY_EXISTS for a name in use, INVALID for what is no region."""
        if not self._allowed:
            raise ServiceError(ErrorKind.UNSUPPORTED, _OFF)
        if name in self._regions:
            raise ServiceError(ErrorKind.ALREADY_EXISTS, f"shared memory region '{name}' already in manager")
        if not name:
            raise invalid("'region name' is necessary to register system shared memory region")
        if len(name) > _LONGEST_NAME:
            raise invalid(f"the name of a shared memory region has at most {_LONGEST_NAME} characters, got {len(name)}")
        if len(self._regions) >= MAX_REGIONS:
            raise invalid(f"{MAX_REGIONS} shared memory regions are registered, which is the limit; unregister some")
        descriptor = _open(key)
        try:
            size = os.fstat(descriptor).st_size
            if byte_size < 1 or offset < 0 or offset + byte_size > size:
                raise invalid(
                    f"failed to register shared memory region '{name}': invalid args: offset {offset} and byte size "
                    f"{byte_size} lie outside the {size} bytes of '{key}'"
                )
        except BaseException:
            os.close(descriptor)
            raise
        region = Region(name, key, offset, byte_size, descriptor)
        # requests in flight may still hold the region when it is unregistered
        weakref.finalize(region, os.close, descriptor)
        self._regions[name] = region

    def status(self, name: str = "") -> list[Region]:
        """All regions, or the one of that name; NOT_FOUND where there is none."""
        if not name:
            return [self._regions[each] for each in sorted(self._regions)]
        if name not in self._regions:
            raise ServiceError(ErrorKind.NOT_FOUND, f"Unable to find system shared memory region: '{name}'")
        return [self._regions[name]]

    def unregister(self, name: str = "") -> None:
        """Forget one region, or all; none of that name is no error."""
        if not self._allowed:
            raise ServiceError(ErrorKind.UNSUPPORTED, _OFF)
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def reader(self, claim: Claim) -> "Reader":
        """What reads the inputs of one request, and holds their bytes by its claim."""
        total = 0

        def read(tensor: str, parameters: Mapping[str, Parameter]) -> bytes | None:
            nonlocal total
            where = self.slice_of(tensor, parameters)
            if where is None:
                return None
            total += where.byte_size
            if total > self._max_request_bytes:
                raise invalid(
                    f"the inputs in shared memory have more than {self._max_request_bytes} bytes, which is the limit "
                    "of a request (--max-request-bytes)"
                )
            claim.grow(where.byte_size)
            return where.read()

        return read

    def slice(self, region: str, byte_size: int, offset: int = 0) -> Slice:
        """A part of a region; NOT_FOUND for an unknown one, INVALID for what lies outside."""
        found = self._regions.get(region)  # once: another thread may unregister it
        if found is None:
            raise ServiceError(ErrorKind.NOT_FOUND, f"Unable to find shared memory region: '{region}'")
        if not 0 <= offset <= found.byte_size:
            raise invalid(f"Invalid offset for shared memory region: '{region}'")
        if byte_size < 0 or offset + byte_size > found.byte_size:
            raise _beyond(region)
        return Slice(found, offset, byte_size)

    def slice_of(self, tensor: str, parameters: Mapping[str, Parameter]) -> Slice | None:
        """The part that a tensor's parameters name, None where they name none."""
        if parameters.keys().isdisjoint((REGION, BYTE_SIZE, OFFSET)):
            return None
        region = _typed(tensor, parameters, REGION, "")
        size, offset = (_typed(tensor, parameters, key, 0) for key in (BYTE_SIZE, OFFSET))
        if REGION not in parameters:
            key = BYTE_SIZE if BYTE_SIZE in parameters else OFFSET
            raise invalid(f"'{key}' can not be specified without '{REGION}' parameter for tensor '{tensor}'")
        if BYTE_SIZE not in parameters:
            raise invalid(f"'{BYTE_SIZE}' must be specified along with '{REGION}' parameter for tensor '{tensor}'")
        return self.slice(region, size, offset)


Reader = Callable[[str, Mapping[str, Parameter]], bytes | None]
"""The bytes of an input by its name and parameters, None where these name no region; INVALID where all inputs of the
request have too many."""


def _typed(tensor: str, parameters: Mapping[str, Parameter], key: str, default: _T) -> _T:
    value = parameters.get(key, default)
    if type(value) is not type(default):
        expected = "string_param" if isinstance(default, str) else "int64_param"
        raise invalid(f"invalid value type for '{key}' parameter for tensor '{tensor}', expected {expected}.")
    return value


def _open(key: str) -> int:
    """Open the object of a key; only names directly in /dev/shm, no links, no other kinds of files."""
    name = key.removeprefix("/")
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise invalid(f"Unable to open shared memory region: '{key}': a key is one name, such as /name")
    try:
        descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise invalid(f"Unable to open shared memory region: '{key}': {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise invalid(f"Unable to open shared memory region: '{key}': it is no shared memory object")
    return descriptor


_NUMBERS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64")


Delivery = Callable[[InferResponse], set[str]]
"""Puts a response's outputs where the client wants them; names of those that are in shared memory now."""


def delivery(outputs: Sequence[RequestedOutput], memory: SharedMemory, *, batched: bool) -> Delivery:
    """What is to be done with these outputs of each response; INVALID where it is unclear."""
    wanted: dict[str, Slice | int] = {}
    for output in outputs:
        if not output.parameters:
            continue
        classes = output.parameters.get("classification", 0)
        if type(classes) is not int:
            raise invalid("invalid value type for 'classification' parameter, expected int64_param")
        if classes < 0 or (classes == 0 and "classification" in output.parameters):
            raise invalid("invalid value for 'classification' parameter, expected >= 0")
        if classes and REGION in output.parameters:
            raise invalid("output can't set both 'shared_memory_region' and 'classification'")
        if place := memory.slice_of(output.name, output.parameters) or classes:
            wanted[output.name] = place

    def deliver(response: InferResponse) -> set[str]:
        elsewhere = set[str]()
        for at, output in enumerate(response.outputs if wanted else ()):
            place = wanted.get(output.name)
            if isinstance(place, Slice):
                place.write(output.name, to_bytes(output))
                elsewhere.add(output.name)
            elif place is not None:
                response.outputs[at] = classify(output, place, batched=batched)
        return elsewhere

    return deliver


def classify(tensor: Tensor, classes: int, *, batched: bool) -> Tensor:
    """Triton's classification: the `classes` largest values as texts `value:index`, of a tensor, or if it is `batched`
    of each row of its first axis: BYTES [rows, n].

    The largest comes first, of equal ones the one with the smaller index. INVALID for what is no number.
    """
    if tensor.datatype not in _NUMBERS:
        raise invalid(f"class result not available for output due to unsupported type '{tensor.datatype}'")
    rows = tensor.data.reshape(tensor.shape[0] if batched and tensor.shape else 1, -1)
    kept = min(classes, rows.shape[1])
    texts: NDArray[Any] = np.empty((len(rows), kept), dtype=object)
    for at, row in enumerate(rows):
        texts[at] = _largest(row, kept)
    shape = texts.shape if batched else texts.shape[1:]
    return Tensor(tensor.name, "BYTES", shape, texts.reshape(shape))


def _largest(row: NDArray[Any], count: int) -> list[bytes]:
    floating = row.dtype.kind == "f"
    # a complement turns integers round where a minus would overflow
    order = np.argsort(-row if floating else ~row, kind="stable")[:count]
    return [(f"{row[at]:f}:{at}" if floating else f"{row[at]}:{at}").encode() for at in order.tolist()]
