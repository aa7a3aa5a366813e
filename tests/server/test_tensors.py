import itertools
import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

from hasten.server.protocol.shared_memory import classify
from hasten.server.protocol.tensors import NUMPY, elements_json, flatten, from_bytes, from_list, to_bytes
from hasten.server.types import ErrorKind, ServiceError, Tensor

NUMBERS = [name for name in NUMPY if name not in ("BYTES", "BF16")]


def read(datatype: str, shape: tuple[int, ...], raw: bytes) -> Tensor:
    return from_bytes("x", datatype, shape, raw, model="m", request_id="")


def as_json(tensor: Tensor) -> Any:
    return json.loads(bytes(elements_json(tensor)))


@pytest.mark.parametrize("datatype", NUMBERS)
def test_raw_bytes_are_those_of_tritons_own_client(datatype: str) -> None:
    values = np.arange(6).reshape(2, 3).astype(triton_to_np_dtype(datatype))
    tensor = read(datatype, (2, 3), values.tobytes())
    np.testing.assert_array_equal(tensor.data, values)
    assert tensor.data.dtype == values.dtype
    assert to_bytes(tensor) == values.tobytes()


def test_bytes_are_those_of_tritons_own_client() -> None:
    texts = np.array([[b"", b"ab"], ["é".encode(), b"\x00\xff"]], dtype=object)
    raw = serialize_byte_tensor(texts).item()
    tensor = read("BYTES", (2, 2), raw)
    assert tensor.data.tolist() == texts.tolist()
    assert to_bytes(tensor) == raw


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [  # the texts of Triton 2.51.0
        ("FP32", (2, 2), b"1234" * 3, "input byte size mismatch for input 'x' for model 'm'. Expected 16, got 12"),
        ("BYTES", (2,), b"\1\0\0\0a", "expected 2 string elements for inference input 'x' for model 'm', got 1"),
        (
            "BYTES",
            (1,),
            b"\1\0\0\0a\1\0\0\0b",
            "unexpected number of string elements 2 for inference input 'x' for model 'm', expecting 1",
        ),
        (
            "BYTES",
            (1,),
            b"\1\0",
            "incomplete string length indicator for inference input 'x' for model 'm', expecting 4",
        ),
        (
            "BYTES",
            (1,),
            b"\x1e\0\0\0abc",
            "incomplete string data for inference input 'x', expecting string of length 30 but only 3 bytes available",
        ),
        ("BYTES", (2**30,), b"", "expected 1073741824 string elements"),
        ("FP32", (1, -1), b"1234", "invalid shape [1,-1]"),
        ("FP32", (2**62, 4), b"", "invalid shape"),
        ("FP32", (1,) * 40, b"1234", "invalid shape"),
        ("FP32", (0, 2**31 - 1, 2**31 - 1, 2**31 - 1), b"", "too many elements"),
        ("FP64", (2**31 - 1, 2**31 - 1), b"12345678", "too many elements"),
        ("FP33", (1,), b"1234", "invalid datatype for input x"),
    ],
)
def test_wrong_bytes_are_refused(datatype: str, shape: tuple[int, ...], raw: bytes, message: str) -> None:
    with pytest.raises(ServiceError) as error:
        read(datatype, shape, raw)
    assert message in str(error.value)
    assert error.value.kind is ErrorKind.INVALID


def test_any_byte_but_zero_is_true() -> None:
    assert read("BOOL", (3,), b"\0\1\2").data.tolist() == [False, True, True]


@given(st.binary(max_size=40), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_strings_are_read_whole_or_refused(raw: bytes, count: int) -> None:
    try:
        tensor = read("BYTES", (count,), raw)
    except ServiceError:
        return
    assert to_bytes(tensor) == raw


@pytest.mark.parametrize("datatype", [name for name in NUMBERS if name not in ("FP16", "BOOL")])
def test_json_lists_may_be_flat_or_nested(datatype: str) -> None:
    for data in ([1, 2, 3, 4], [[1, 2], [3, 4]], [[[1], [2]], [3, [4]]]):
        tensor = from_list("x", datatype, [2, 2], data)
        assert tensor.data.dtype == NUMPY[datatype]
        assert as_json(tensor) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("datatype", "data", "message"),
    [
        ("INT32", [1.0], "non-signed-integer as signed-integer"),
        ("INT32", [True], "non-signed-integer as signed-integer"),
        ("UINT8", ["1"], "non-unsigned-integer as unsigned-integer"),
        ("UINT8", [256], "does not fit UINT8"),
        ("UINT8", [-1], "does not fit UINT8"),
        ("INT64", [2**64 - 1], "does not fit INT64"),
        ("FP32", ["a"], "non-number as double"),
        ("FP32", [None], "non-number as double"),
        ("FP64", [10**400], "does not fit FP64"),
        ("BOOL", [1], "non-boolean as boolean"),
        ("BYTES", [1], "non-string as string"),
        ("FP32", 1, "non-array as array"),
        ("FP32", {"a": 1}, "non-array as array"),
        ("FP32", [1, 2], "Shape does not match true shape of 'data' field"),
        ("FP16", [1.0], "receiving FP16 data via JSON is not supported. Please use the binary data format for input x"),
    ],
)
def test_wrong_json_lists_are_refused(datatype: str, data: Any, message: str) -> None:
    with pytest.raises(ServiceError) as error:
        from_list("x", datatype, [1], data)
    assert message in str(error.value)


def test_numbers_beyond_a_float_are_infinite_as_for_triton() -> None:
    assert as_json(from_list("x", "FP32", [1], [1e39])) == [math.inf]


def test_lists_may_be_nested_as_deeply_as_triton_takes_them() -> None:
    data: list[Any] = [1, 2]
    for _ in range(99):
        data = [data]
    assert flatten(data) == [1, 2]
    assert flatten([[1, [2]], [], [[[3]], 4]]) == [1, 2, 3, 4]
    with pytest.raises(ServiceError, match="nested more than 100 deep"):
        flatten([data])


def test_lists_are_not_unpacked_for_ever() -> None:
    data: list[Any] = [1]
    for _ in range(200):
        data = [data]
    with pytest.raises(ServiceError, match="nested more than 100 deep"):
        flatten(data)


def test_text_that_is_no_utf_8_is_still_text() -> None:
    assert as_json(read("BYTES", (1,), struct.pack("<I", 2) + b"a\xff")) == ["a�"]


@pytest.mark.parametrize(
    ("values", "datatype", "classes", "expected"),
    [  # as Triton 2.51.0
        ([5, 9, 9], "UINT8", 2, [b"9:1", b"9:2"]),
        ([5, -9, 7], "INT64", 2, [b"7:2", b"5:0"]),
        ([0.1, 1e20, 3], "FP64", 2, [b"100000000000000000000.000000:1", b"3.000000:2"]),
        ([0, 255], "UINT8", 9, [b"255:1", b"0:0"]),
        ([-128, 127], "INT8", 1, [b"127:1"]),
    ],
)
def test_the_largest_values_are_the_classes(
    values: list[float], datatype: str, classes: int, expected: list[bytes]
) -> None:
    tensor = Tensor("x", datatype, (len(values),), np.array(values, NUMPY[datatype]))
    result = classify(tensor, classes, batched=False)
    assert (result.datatype, result.shape, result.data.tolist()) == ("BYTES", (len(expected),), expected)


def test_each_row_of_a_batch_has_its_own_classes() -> None:
    data = np.array([[11, 2.6], [-9, 2.4]], np.float32)
    result = classify(Tensor("x", "FP32", (2, 2), data), 5, batched=True)
    assert result.data.tolist() == [[b"11.000000:0", b"2.600000:1"], [b"2.400000:1", b"-9.000000:0"]]


def test_what_is_no_number_has_no_classes() -> None:
    tensor = Tensor("x", "BOOL", (2,), np.array([True, False]))
    with pytest.raises(ServiceError, match="class result not available for output due to unsupported type 'BOOL'"):
        classify(tensor, 1, batched=False)


def test_empty_tensors_are_tensors() -> None:
    for datatype, shape in itertools.product(("FP32", "BYTES"), ((0,), (3, 0))):
        tensor = read(datatype, shape, b"")
        assert tensor.data.shape == shape
        assert to_bytes(tensor) == b""
        assert as_json(tensor) == []


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537, 200_000])
def test_json_in_pieces_is_whole(count: int) -> None:
    numbers = np.arange(count, dtype=np.uint32)
    assert as_json(Tensor("x", "UINT32", (count,), numbers)) == numbers.tolist()
    texts = np.empty(count, object)
    texts[:] = [b"%d" % number for number in range(count)]
    assert as_json(Tensor("x", "BYTES", (count,), texts)) == [str(number) for number in range(count)]
    floats = np.full((2, count), 0.5, np.float32)
    floats[1, -1] = math.inf
    floats[0, 0] = math.nan
    found = as_json(Tensor("x", "FP32", floats.shape, floats))
    np.testing.assert_array_equal(found, floats.ravel())
