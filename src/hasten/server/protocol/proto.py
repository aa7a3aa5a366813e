"""Inference requests and responses to and from Triton's protobuf messages. Texts of errors are Triton's.

Messages are bounded before they are parsed, which holds Python's lock, and with it the server's event loop. What takes
long are many fields and many small elements, 15 to 40 ms a million; long runs of bytes take hardly any time.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from hasten.server.by_size import SMALL
from hasten.server.protocol.shared_memory import REGION, Reader
from hasten.server.protocol.tensors import (
    NUMPY,
    about,
    bounded,
    check_outputs,
    check_texts,
    dtype_of,
    elements,
    from_bytes,
    to_bytes,
)
from hasten.server.types import InferRequest, InferResponse, Parameter, RequestedOutput, Tensor, invalid

MAX_FIELDS = 4096
MAX_BYTES = 2 << 20
"""Of a message without its field of long bytes; of those that have none, as few as are parsed whole, `SMALL`."""
_LONG_BYTES = {pb.ModelInferRequest: "raw_input_contents", pb.RepositoryModelLoadRequest: "parameters"}
"""The field of a message that has long bytes: raw tensors, and files."""
_FIXED = {1: 8, 5: 4}
"""Bytes of a field's value by its wire type."""
_VARINT, _LENGTH = 0, 2
_LONGEST_VARINT = 10


def split_message(kind: Any, raw: bytes) -> tuple[bytes, list[memoryview]]:
    """A serialized message without its field of long bytes, and what that field holds, which is not copied.

    INVALID where it is too large to be parsed without holding up other requests.
    """
    if (long_bytes := _LONG_BYTES.get(kind)) is None:
        raise invalid(f"the request has {len(raw)} bytes, the limit is {SMALL}")
    number = kind.DESCRIPTOR.fields_by_name[long_bytes].number
    view, rest, long, size = memoryview(raw), list[memoryview](), list[memoryview](), 0
    try:
        for count, field in enumerate(_fields(raw)):
            if count == MAX_FIELDS:
                raise invalid(f"the request has more than {MAX_FIELDS} fields (inputs, outputs, parameters)")
            if field.number == number and field.content is not None:
                long.append(view[field.content : field.end])
                continue
            rest.append(view[field.begin : field.end])
            size += field.end - field.begin
            if size > MAX_BYTES:
                hint = "; send tensors as raw_input_contents" if kind is pb.ModelInferRequest else ""
                raise invalid(
                    f"the request without its {long_bytes} has more than {MAX_BYTES} bytes, which is the limit{hint}"
                )
    except (IndexError, ValueError):
        raise not_a_message(kind) from None
    return b"".join(rest), long


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


FINAL = "triton_final_response"
_CHUNK = 1 << 16
"""Elements that are converted at once, a few milliseconds in which no other thread runs."""
_ID, _RAW_OUTPUT, _INFER_RESPONSE = 3, 6, 2
"""Numbers of fields, of ModelInferResponse and of ModelStreamInferResponse."""
_KEPT = 1024
"""Heads of responses that are kept serialized."""
_SHOWN_SIZES = 17
"""Of a shape in an error; one more than a tensor may have."""

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_HELD_BY = {field: datatype for datatype, field in _CONTENTS.items()}
"""The largest data type that each field is for."""


def parsed(kind: Any, raw: bytes) -> Any:
    """The message in some bytes; INVALID where it is none, or too large. gRPC itself would answer UNKNOWN."""
    if len(raw) > SMALL:
        split_message(kind, raw)
    return _parsed(kind, raw)


def _parsed(kind: Any, raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise not_a_message(kind) from None


def parsed_infer(raw: bytes) -> tuple[Any, Sequence[bytes | memoryview]]:
    """The ModelInferRequest in some bytes, and its raw tensors, which large messages are parsed without."""
    if len(raw) <= SMALL:
        message = _parsed(pb.ModelInferRequest, raw)
        return message, message.raw_input_contents
    rest, tensors = split_message(pb.ModelInferRequest, raw)
    return _parsed(pb.ModelInferRequest, rest), tensors


def infer_request(message: Any, tensors: Sequence[bytes | memoryview], read: Reader) -> InferRequest:
    """The request of a ModelInferRequest and its raw tensors; INVALID where it is wrong in itself.

    Raw tensors belong to the inputs in their order, but for those that `read` finds in shared memory.
    """
    raw = iter(tensors) if tensors else None
    check_outputs(len(message.outputs))
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        parameters=parameters(message.parameters),
        inputs=bounded(_input(message, tensor, raw, read) for tensor in message.inputs),
        outputs=[RequestedOutput(output.name, parameters(output.parameters)) for output in message.outputs],
    )


def parameters(messages: Mapping[str, Any]) -> dict[str, Parameter]:
    """Plain values of a map of InferParameter."""
    return {key: _value(key, message) for key, message in messages.items()}


def _value(key: str, message: Any) -> Parameter:
    kind = message.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"invalid value type for '{key}' parameter, expected int64_param, bool_param, or string_param.")
    value: Parameter = getattr(message, kind)
    return value


def _input(message: Any, tensor: Any, raw: Iterator[bytes | memoryview] | None, read: Reader) -> Tensor:
    model, request_id, name = message.model_name, message.id, tensor.name
    if tensor.datatype not in NUMPY:  # the service tells what the model expects instead
        return Tensor(name, tensor.datatype, tuple(tensor.shape[:_SHOWN_SIZES]), np.empty(0, np.uint8))
    typed = tensor.HasField("contents")
    if typed and tensor.contents.ByteSize() and REGION in tensor.parameters:
        raise invalid(
            f"unexpected 'content' provided when using shared memory for input tensor '{name}' for model '{model}'"
        )
    shared = read(name, parameters(tensor.parameters)) if tensor.parameters else None
    if shared is None and raw is None:
        return _typed(tensor, model=model, request_id=request_id)
    if shared is None and typed and tensor.contents.ByteSize():
        raise invalid(
            f"contents field must not be specified when using raw_input_contents for '{name}' for model '{model}'"
        )
    contents = next(raw, None) if shared is None and raw is not None else shared
    if contents is None:
        raise _missing(name, model)
    return from_bytes(name, tensor.datatype, tensor.shape, contents, model=model, request_id=request_id)


def _missing(name: str, model: str) -> Exception:
    return invalid(f"unable to find data for input tensor '{name}' for model '{model}' in request.")


def _typed(tensor: Any, *, model: str, request_id: str) -> Tensor:
    """An input whose elements are in one of the fields of InferTensorContents."""
    name, datatype = tensor.name, tensor.datatype
    dtype, count, shape = dtype_of(name, datatype), elements(name, tensor.shape), tuple(tensor.shape)
    fields = [field.name for field, _ in tensor.contents.ListFields()]
    if not fields and count and not dtype.hasobject:
        raise _missing(name, model)
    expected = _CONTENTS.get(datatype)
    for field in fields:
        if field != expected:
            raise invalid(
                f"unexpected explicit tensor data for input tensor '{name}' for model '{model}' of type "
                f"'{_HELD_BY[field]}', expected datatype '{datatype}'"
            )
    values = getattr(tensor.contents, expected) if fields and expected else ()
    if len(values) != count:
        size = dtype.itemsize
        where = f"inference input '{name}' for model '{model}'"
        if dtype.hasobject and len(values) > count:
            message = f"unexpected number of string elements {len(values)} for {where}, expecting {count}"
        elif dtype.hasobject:
            message = f"expected {count} string elements for {where}, got {len(values)}"
        else:
            message = (
                f"input byte size mismatch for input '{name}' for model '{model}'. "
                f"Expected {count * size}, got {len(values) * size}"
            )
        raise invalid(about(request_id) + message)
    if dtype.hasobject:
        check_texts(count)
    data = np.empty(count, dtype)
    try:
        for begin in range(0, count, _CHUNK):
            data[begin : begin + _CHUNK] = values[begin : begin + _CHUNK]
    except OverflowError as error:
        raise invalid(f"a value of input '{name}' for model '{model}' does not fit {datatype}: {error}") from None
    return Tensor(name, datatype, shape, data.reshape(shape))


def infer_response(response: InferResponse, elsewhere: set[str], *, final: bool | None = None) -> bytes:
    """The ModelInferResponse of a response, serialized, its tensors raw; empty for those that are `elsewhere`, in
    shared memory.

    `final`, where it is given, becomes the parameter `triton_final_response`. A stream has one of these for each token,
    so all but its tensors and its id was serialized before.
    """
    outputs = response.outputs
    parts = [
        _head(response.model, response.version, final, *[(each.name, each.datatype, each.shape) for each in outputs])
    ]
    if response.id:
        parts.append(field(_ID, response.id.encode()))
    for output in outputs:
        parts.append(field(_RAW_OUTPUT, b"" if output.name in elsewhere else to_bytes(output)))
    return b"".join(parts)


def stream_response(response: bytes) -> bytes:
    """The ModelStreamInferResponse, serialized, of a ModelInferResponse."""
    return field(_INFER_RESPONSE, response)


def field(number: int, value: bytes) -> bytes:
    """A field of a message that holds bytes, a text or another message, serialized."""
    size = len(value)
    if size <= 0x7F:
        return bytes((number << 3 | 2, size)) + value
    head = bytearray((number << 3 | 2,))
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + value


@lru_cache(_KEPT)
def _head(model: str, version: str, final: bool | None, *outputs: tuple[str, str, tuple[int, ...]]) -> bytes:
    """What does not change from response to response; outputs are names, data types and shapes."""
    message = pb.ModelInferResponse(model_name=model, model_version=version)
    if final is not None:
        message.parameters[FINAL].bool_param = final
    for name, datatype, shape in outputs:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    return bytes(message.SerializeToString())
