"""JSON that would hold up the server while it is parsed is refused by its size, without being parsed."""

import time

import pytest

from hasten.core.errors import InvalidRequestError
from hasten.server.json_size import MAX_JSON_BYTES, check_json_size
from hasten.server.protocol.bodies import DuplicateKeyError, parse_json


def repeated(piece: bytes, size: int) -> bytes:
    return b'{"a":[' + piece * (size // len(piece)) + b"1]}"


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'{"a":1},', b"1,", b'"a",', b"[[1],[]],"])
def test_many_values_are_refused(piece: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"too many values to be read at once .* send less at once"):
        check_json_size(repeated(piece, MAX_JSON_BYTES - 100))


@pytest.mark.parametrize("piece", [b"[],", b"1,", b"a"])
def test_many_bytes_are_refused(piece: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=rf"the JSON has \d+ bytes, the limit is {MAX_JSON_BYTES}"):
        check_json_size(repeated(piece, 60 << 20))


@pytest.mark.parametrize(
    "body",
    [
        repeated(b"123456,", 990_000 * 7),
        b'["' + b"a" * (MAX_JSON_BYTES - 10) + b'"]',
        repeated(b"[1],", 40_000 * 4),
        b"[" * 60_000,
    ],
)
def test_what_is_parsed_quickly_is_not(body: bytes) -> None:
    check_json_size(body)


def test_a_key_that_comes_twice_is_found_among_many() -> None:
    keys = [b'"%x":1' % number for number in range(200_000)]
    began = time.process_time()
    with pytest.raises(DuplicateKeyError, match="the key '5' comes twice"):
        parse_json(b"{" + b",".join([*keys, b'"5":2']) + b"}")
    assert time.process_time() - began < 20  # compared with each other they would take minutes
