"""Protobuf messages whose parsing would hold up a server, against those that clients send."""

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from hasten.server.inflight import InflightBytes
from hasten.server.protocol.proto import MAX_BYTES, MAX_FIELDS, infer_request, parsed, parsed_infer, split_message
from hasten.server.protocol.shared_memory import SharedMemory
from hasten.server.protocol.tensors import MAX_TENSORS, MAX_TEXTS
from hasten.server.types import LONGEST_MESSAGE, InferRequest, ServiceError

INFER = pb.ModelInferRequest
LIMIT = "more than 2097152 bytes, which is the limit"
FIELDS = "more than 4096 fields"


def tensor(shape: list[int], datatype: str = "UINT32", raw: bytes | None = None, **contents: Any) -> bytes:
    message = INFER(model_name="m", raw_input_contents=[] if raw is None else [raw])
    result = message.inputs.add(name="x", datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(result.contents, field).extend(values)
    return bytes(message.SerializeToString())


def load(size: int) -> bytes:
    message = pb.RepositoryModelLoadRequest(model_name="m")
    message.parameters["file:1/model.bin"].bytes_param = bytes(size)
    return bytes(message.SerializeToString())


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (INFER, tensor([10**6], uint_contents=[300] * 10**6)),
        (INFER, tensor([1 << 24], raw=bytes(1 << 26))),
        (INFER, tensor([1], "BYTES", bytes_contents=[bytes(MAX_BYTES - 100)])),
        (pb.RepositoryModelLoadRequest, load(1 << 26)),
        (pb.ModelReadyRequest, pb.ModelReadyRequest(name="n" * 65_000).SerializeToString()),
        (INFER, b"\x2a\x00" * MAX_FIELDS),
    ],
)
def test_messages_of_clients_are_parsed(kind: Any, raw: bytes) -> None:
    assert parsed(kind, raw).ByteSize() == len(raw)


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        (
            INFER,
            tensor([3 << 20], uint_contents=[5] * (3 << 20)),
            f"without its raw_input_contents has {LIMIT}; send tensors",
        ),
        (INFER, tensor([1] * 3 * 10**6), LIMIT),
        (INFER, b"\x2a\x00" * 10**5, FIELDS),
        (INFER, b"\x32\x00" * 10**5, FIELDS),
        (INFER, b"\x3a\x00" * 10**5, FIELDS),
        (pb.RepositoryModelLoadRequest, b"\x1a\x00" * 10**5, FIELDS),
        (
            pb.ModelReadyRequest,
            pb.ModelReadyRequest(name="n" * 65_536).SerializeToString(),
            "65540 bytes, the limit is",
        ),
        (INFER, b"\xff" * 10**6, "not a message of type 'inference.ModelInferRequest'"),
        (INFER, b"\x0b" * 10**6, "not a message of type"),
        (INFER, b"\x0a\xff\xff\xff\x7f" + bytes(10**6), "not a message of type"),
    ],
)
def test_those_that_take_long_are_refused_unparsed(kind: Any, raw: bytes, message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        split_message(kind, raw)


def many(**counts: int) -> bytes:
    message = INFER(model_name="m")
    for number in range(counts.get("inputs", 0)):
        message.inputs.add(name=f"i{number}", datatype="UINT32", shape=[0])
    for number in range(counts.get("outputs", 0)):
        message.outputs.add(name=f"o{number}")
    return message.SerializeToString()


def read(raw: bytes) -> InferRequest:
    return infer_request(*parsed_infer(raw), SharedMemory().reader(InflightBytes().claim()))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (many(inputs=MAX_TENSORS + 1), "more than 1024 inputs"),
        (many(outputs=MAX_TENSORS + 1), "asks for 1025 outputs, the limit is 1024"),
        (tensor([10**7], "BYTES", bytes(4 * 10**7)), "more than 262144 elements of BYTES"),
        (tensor([10**6], "BYTES", bytes_contents=[b""] * 10**6), "more than 262144 elements of BYTES"),
        (tensor([5], uint_contents=[1] * 10**6), "Expected 20, got 4000000"),
    ],
)
def test_what_would_take_long_to_convert_is_refused(message: bytes, text: str) -> None:
    with pytest.raises(ServiceError, match=text):
        read(message)


def test_many_elements_are_converted_in_pieces() -> None:
    values = list(range(200_000))
    (found,) = read(tensor([200_000], uint_contents=values)).inputs
    assert found.data.tolist() == values
    texts = [str(number).encode() for number in range(MAX_TEXTS)]
    assert read(tensor([MAX_TEXTS], "BYTES", bytes_contents=texts)).inputs[0].data.tolist() == texts


def test_errors_name_no_more_of_a_request_than_fits_a_line() -> None:
    message = INFER(model_name="m")
    message.inputs.add(name="n" * 10**5, datatype="UINT32", shape=[1, 2])
    with pytest.raises(ServiceError) as error:
        read(message.SerializeToString())
    assert len(str(error.value)) == LONGEST_MESSAGE
    assert str(error.value).endswith("...")


def test_raw_tensors_of_large_messages_are_not_copied() -> None:
    message = INFER(model_name="m", id="7", raw_input_contents=[bytes([1]) * 10**5, b"", b"ab"])
    for name, size in (("a", 10**5), ("b", 0), ("c", 2)):
        message.inputs.add(name=name, datatype="UINT8", shape=[size])
    raw = message.SerializeToString() + INFER(model_version="3").SerializeToString()
    found = read(raw)
    assert (found.model, found.id, found.version) == ("m", "7", "3")
    assert [tensor.data.tobytes() for tensor in found.inputs] == list(message.raw_input_contents)
    assert np.shares_memory(found.inputs[0].data, np.frombuffer(raw, np.uint8))
