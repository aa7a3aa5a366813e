"""How large a protobuf message may be: parsing it holds Python's lock, and with it the server's event loop.

What takes long are many fields and many small elements, 15 to 40 ms a million; long runs of bytes take hardly any time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tritonclient.grpc import service_pb2 as pb

from hasten.server.by_size import SMALL
from hasten.server.types import invalid

MAX_FIELDS = 4096
MAX_BYTES = 2 << 20
"""Of a message without its field of long bytes; of those that have none, as few as are parsed whole, `SMALL`."""
_LONG_BYTES = {pb.ModelInferRequest: "raw_input_contents", pb.RepositoryModelLoadRequest: "parameters"}
"""The field of a message that has long bytes: raw tensors, and files."""
_FIXED = {1: 8, 5: 4}
"""Bytes of a field's value by its wire type."""
_VARINT, _LENGTH = 0, 2
_LONGEST_VARINT = 10


def check_message_size(kind: Any, raw: bytes) -> None:
    """INVALID where a serialized message is too large to be parsed without holding up other requests."""
    if len(raw) <= SMALL:
        return
    long_bytes = _LONG_BYTES.get(kind)
    if long_bytes is None:
        raise invalid(f"the request has {len(raw)} bytes, the limit is {SMALL}")
    number = kind.DESCRIPTOR.fields_by_name[long_bytes].number
    size = 0
    try:
        for count, field in enumerate(_fields(raw)):
            if count == MAX_FIELDS:
                raise invalid(f"the request has more than {MAX_FIELDS} fields (inputs, outputs, parameters)")
            size += 0 if field.number == number else field.end - field.begin
            if size > MAX_BYTES:
                hint = "; send tensors as raw_input_contents" if kind is pb.ModelInferRequest else ""
                raise invalid(
                    f"the request without its {long_bytes} has more than {MAX_BYTES} bytes, which is the limit{hint}"
                )
    except (IndexError, ValueError):
        raise not_a_message(kind) from None


def split_infer(raw: bytes) -> tuple[bytes, list[memoryview]]:
    """A ModelInferRequest that was checked, without its raw tensors; and those, which are not copied."""
    number = pb.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number
    view, rest, tensors = memoryview(raw), list[memoryview](), list[memoryview]()
    for field in _fields(raw):
        if field.number == number and field.content is not None:
            tensors.append(view[field.content : field.end])
        else:
            rest.append(view[field.begin : field.end])
    return b"".join(rest), tensors


def not_a_message(kind: Any) -> Exception:
    """The error of bytes that are no message of a kind."""
    return invalid(f"the request is not a message of type '{kind.DESCRIPTOR.full_name}'")


class _Field(NamedTuple):
    """Where one field is in a message."""

    number: int
    begin: int
    content: int | None
    """Where its bytes begin; None of a number."""
    end: int


def _fields(raw: bytes) -> Iterator[_Field]:
    """The fields of a message. IndexError or ValueError where the bytes are no message."""
    at = 0
    while at < len(raw):
        begin, content = at, None
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(raw, at)
        elif wire == _LENGTH:
            length, content = _varint(raw, at)
            at = content + length
        else:
            at += _FIXED[wire] if wire in _FIXED else len(raw)
        if at > len(raw):
            raise ValueError
        yield _Field(tag >> 3, begin, content, at)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_LONGEST_VARINT):
        byte = raw[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError
