"""Tensors to and from what travels: raw bytes (gRPC and HTTP's binary bodies) and lists of JSON.

Raw bytes are C-order and little-endian; BYTES elements are a 4-byte length followed by as many bytes, end to end.
Texts of errors are Triton's.
"""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten.server.types import Tensor, Texts, invalid

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "BF16": np.dtype("<u2"),  # numpy has no such type: its bits
    "BYTES": np.dtype(object),
}
"""What numpy calls each of Triton's data types."""

_MOST_DIMENSIONS = 16
_DEEPEST_LIST = 100
_LARGEST_DIMENSION = 2**31
_MOST_ELEMENTS = 2**48
MAX_TEXTS = 1 << 18
"""Elements of BYTES in a request: each is an object of Python's, of which a million take a second."""
MAX_TENSORS = 1024
"""Inputs of a request, and outputs that it asks for."""
_PIECE = 1 << 16
"""Elements that are converted to JSON at once."""
_LENGTH = struct.Struct("<I")
_JSON_TYPES: dict[str, tuple[frozenset[type], str]] = {
    "B": (frozenset({bool}), "non-boolean as boolean"),
    "u": (frozenset({int}), "non-unsigned-integer as unsigned-integer"),
    "i": (frozenset({int}), "non-signed-integer as signed-integer"),
    "f": (frozenset({int, float}), "non-number as double"),
    "O": (frozenset({str}), "non-string as string"),
}


def about(request_id: str) -> str:
    """How messages about a request begin."""
    return f"[request id: {request_id or '<id_unknown>'}] "


def elements(name: str, shape: Sequence[int]) -> int:
    """Number of elements of an input; INVALID for a shape that no tensor has."""
    if shape and (len(shape) > _MOST_DIMENSIONS or not 0 <= min(shape) <= max(shape) < _LARGEST_DIMENSION):
        text = ",".join(map(str, shape[:_MOST_DIMENSIONS]))
        raise invalid(f"invalid shape [{text}] for input '{name}': dimensions must be from 0 to {_LARGEST_DIMENSION}")
    if math.prod(filter(None, shape)) > _MOST_ELEMENTS:  # numpy multiplies them without the zeros
        raise invalid(f"invalid shape [{','.join(map(str, shape))}] for input '{name}': too many elements")
    return math.prod(shape)


def check_texts(count: int) -> None:
    """INVALID where a request has too many elements of BYTES."""
    if count > MAX_TEXTS:
        raise invalid(f"the inputs have more than {MAX_TEXTS} elements of BYTES, which is the limit of a request")


def bounded(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The inputs of a request, one after the other as they are converted; INVALID once they are too many."""
    result: list[Tensor] = []
    texts = 0
    for tensor in tensors:
        result.append(tensor)
        texts += tensor.data.size if tensor.data.dtype.hasobject else 0
        check_texts(texts)
        if len(result) > MAX_TENSORS:
            raise invalid(f"the request has more than {MAX_TENSORS} inputs, which is the limit")
    return result


def check_outputs(count: int) -> None:
    """INVALID where a request asks for too many outputs."""
    if count > MAX_TENSORS:
        raise invalid(f"the request asks for {count} outputs, the limit is {MAX_TENSORS}")


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """The type that numpy has for an input; INVALID for a data type that Triton does not have."""
    try:
        return NUMPY[datatype]
    except KeyError:
        raise invalid(f"invalid datatype for input {name}") from None


def from_bytes(
    name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview, *, model: str, request_id: str
) -> Tensor:
    """A tensor over `raw`, without a copy but for BYTES."""
    shape = tuple(shape)
    dtype, count = dtype_of(name, datatype), elements(name, shape)
    if dtype.hasobject:
        check_texts(min(count, len(raw) // _LENGTH.size))
        texts = _strings(name, raw, count, model=model, request_id=request_id)
        return Tensor(name, datatype, shape, objects(texts).reshape(shape))
    if len(raw) != count * dtype.itemsize:
        raise invalid(
            f"{about(request_id)}input byte size mismatch for input '{name}' for model '{model}'. "
            f"Expected {count * dtype.itemsize}, got {len(raw)}"
        )
    data = np.frombuffer(raw, dtype)
    if datatype == "BOOL":
        data = data.view(np.uint8) != 0  # any other byte would be neither true nor false to numpy
    return Tensor(name, datatype, shape, data.reshape(shape))


def _strings(name: str, raw: bytes | memoryview, count: int, *, model: str, request_id: str) -> list[bytes]:
    strings: list[bytes] = []
    at, end = 0, len(raw)
    where = f"inference input '{name}' for model '{model}'"
    while at < end:
        if len(strings) == count:
            raise invalid(
                f"{about(request_id)}unexpected number of string elements {count + 1} for {where}, expecting {count}"
            )
        if end - at < _LENGTH.size:
            raise invalid(
                f"{about(request_id)}incomplete string length indicator for {where}, expecting 4 bytes but only "
                f"{end - at} bytes available. Please make sure the string length indicator is in one buffer."
            )
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if end - at < length:
            raise invalid(
                f"incomplete string data for inference input '{name}', expecting string of length {length} but only "
                f"{end - at} bytes available"
            )
        strings.append(bytes(raw[at : at + length]))
        at += length
    if len(strings) < count:
        raise invalid(f"{about(request_id)}expected {count} string elements for {where}, got {len(strings)}")
    return strings


def objects(values: Sequence[bytes]) -> NDArray[Any]:
    """An array of these, which numpy would otherwise make one of fixed length of."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def byte_size(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors' elements."""
    size = 0
    for tensor in tensors:
        texts = texts_of(tensor)
        size += tensor.data.nbytes if texts is None else sum(map(len, texts))
    return size


def texts_of(tensor: Tensor) -> list[bytes] | None:
    """The elements of a tensor of BYTES; None of one of numbers."""
    if isinstance(tensor, Texts):
        return tensor.elements
    texts: list[bytes] | None = tensor.data.ravel().tolist() if tensor.data.dtype.hasobject else None
    return texts


def to_bytes(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor."""
    texts = texts_of(tensor)
    if texts is None:
        return tensor.data.tobytes()
    return b"".join([_LENGTH.pack(len(text)) + text for text in texts])


def from_list(name: str, datatype: str, shape: Sequence[int], data: Any) -> Tensor:
    """A tensor from JSON's lists, flat or nested; INVALID where a value is of another type or does not fit."""
    dtype, count = dtype_of(name, datatype), elements(name, shape)
    if datatype in ("FP16", "BF16"):
        raise invalid(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input {name}"
        )
    if not isinstance(data, list):
        raise invalid("Unable to parse 'data': attempt to access JSON non-array as array")
    flat = flatten(data)
    types, complaint = _JSON_TYPES["B" if datatype == "BOOL" else dtype.kind]
    if not types.issuperset(map(type, flat)):
        where = "JSON bytes array" if datatype == "BYTES" else "'data'"
        raise invalid(f"Unable to parse {where}: attempt to access JSON {complaint} (input '{name}')")
    if len(flat) != count:
        raise invalid(f"Unable to parse 'data': Shape does not match true shape of 'data' field (input '{name}')")
    if dtype.hasobject:
        check_texts(count)
    return Tensor(name, datatype, tuple(shape), _array(name, datatype, dtype, flat).reshape(tuple(shape)))


def _array(name: str, datatype: str, dtype: np.dtype[Any], flat: list[Any]) -> NDArray[Any]:
    if dtype.hasobject:
        return objects([text.encode() for text in flat])
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, dtype)
    except OverflowError:
        raise invalid(f"Unable to parse 'data': a value does not fit {datatype} (input '{name}')") from None


def flatten(data: list[Any]) -> list[Any]:
    """The leaves of nested lists, in order; INVALID where they are nested deeper than Triton takes them."""
    leaves: list[Any] = []
    _add_leaves(data, leaves, 1)
    return leaves


def _add_leaves(data: list[Any], leaves: list[Any], depth: int) -> None:
    if depth > _DEEPEST_LIST:
        raise invalid(f"Unable to parse 'data': lists are nested more than {_DEEPEST_LIST} deep")
    if list not in set(map(type, data)):
        leaves += data
        return
    for part in data:
        if type(part) is list:
            _add_leaves(part, leaves, depth + 1)
        else:
            leaves.append(part)


def elements_json(tensor: Tensor) -> msgspec.Raw:
    """The elements as a flat list of JSON, made in pieces between which other threads run.

    BYTES become text; what is not UTF-8 in them is replaced. NaN and Infinity are written as such, as Triton does.
    """
    if tensor.datatype in ("FP16", "BF16"):
        raise invalid(
            f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data format for output"
        )
    flat = tensor.data.ravel()
    pieces = (_piece_json(flat[begin : begin + _PIECE]) for begin in range(0, flat.size, _PIECE))
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def _piece_json(data: NDArray[Any]) -> bytes:
    if data.dtype.hasobject:
        return msgspec.json.encode([text.decode(errors="replace") for text in data.tolist()])[1:-1]
    if data.dtype.kind != "f" or np.isfinite(data).all():
        return msgspec.json.encode(data.tolist())[1:-1]
    return json.dumps(data.tolist(), separators=(",", ":")).encode()[1:-1]
