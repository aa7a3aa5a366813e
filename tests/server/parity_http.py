"""Requests over HTTP that a real Triton and hasten answer alike, and those that they answer differently for a reason.

All ask the models of `AddingService`.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tests.server.parity import HEADER_LENGTH, Ask
from tests.server.parity_grpc import OTHER_BATCH

ADD, TEXT = "/v2/models/add/infer", "/v2/models/text/infer"
GENERATE = "/v2/models/text/generate"
PAIR = ("INPUT0", "INPUT1")
DECOUPLED_INPUT = {"name": "IN", "datatype": "INT32", "shape": [1], "data": [1]}


def numbers(count: int) -> list[float]:
    return [float(number) for number in range(count)]


def adding(shape: Sequence[int] = (1, 2), **fields: Any) -> dict[str, Any]:
    """A body that adds two tensors of a shape."""
    data = numbers(int(np.prod(shape)))
    inputs = [{"name": name, "datatype": "FP32", "shape": list(shape), "data": data} for name in PAIR]
    return {"inputs": inputs, **fields}


def changed(**fields: Any) -> dict[str, Any]:
    """The same with another first input; None removes a field."""
    body = adding()
    first = body["inputs"][0] | fields
    body["inputs"][0] = {key: value for key, value in first.items() if value is not None}
    return body


def asking(*parameters: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The same with outputs of these parameters."""
    outputs = [{"name": f"OUTPUT{at}", "parameters": each} for at, each in enumerate(parameters)]
    return adding((2, 3), outputs=outputs, **fields)


def binary(tail: bytes = b"", size: int = 8, packed: str = "", accepts: str = "identity", **fields: Any) -> Ask:
    """A request with binary inputs."""
    inputs = [
        {"name": name, "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": size}} for name in PAIR
    ]
    head = json.dumps({"inputs": inputs, **fields}).encode()
    body = head + 2 * np.array(numbers(2), np.float32).tobytes() + tail
    packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}
    headers = [(HEADER_LENGTH, str(len(head))), ("accept-encoding", accepts)]
    headers += [("content-encoding", packed)] if packed else []
    return Ask(ADD, packers[packed](body), tuple(headers))


def text(value: Any, **fields: Any) -> dict[str, Any]:
    """A body for the model of text."""
    return {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [value]}], **fields}


def raw_text(raw: bytes) -> Ask:
    """The same with a binary input."""
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return Ask(TEXT, head + raw, ((HEADER_LENGTH, str(len(head))),))


def same_type(kind: str, data: list[Any]) -> Ask:
    """A request to the model that gives back what it gets."""
    tensor = {"name": "IN", "datatype": kind, "shape": [len(data)], "data": data}
    return Ask(f"/v2/models/id_{kind.lower()}/infer", {"inputs": [tensor]})


_BODIES = {
    "plain": adding(),
    "id": adding(id="x"),
    "parameters": adding(parameters={"a": 1, "b": "x", "c": True, "d": 1.5}),
    "a batch": adding((3, 2)),
    "an output": adding(outputs=[{"name": "OUTPUT1"}]),
    "outputs in another order": adding(outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}]),
    "no outputs": adding(outputs=[]),
    "one output binary": asking({"binary_data": True}, {}),
    "all outputs binary": adding(parameters={"binary_data_output": True}),
    "all binary but one": asking({"binary_data": False}, {}, parameters={"binary_data_output": True}),
    "classes": asking({"classification": 2}),
    "more classes than there are": asking({"classification": 9}),
    "binary classes": asking({"classification": 1, "binary_data": True}),
    "0 classes": asking({"classification": 0}),
    "infinity": changed(data=[3.3e38, 1]) | {"outputs": [{"name": "OUTPUT0"}]},
    # what is wrong with a body
    "no inputs": {},
    "inputs are no list": {"inputs": {}},
    "an input is no object": {"inputs": [1]},
    "an empty input": {"inputs": [{}]},
    "an empty list of inputs": {"inputs": []},
    "id is a number": adding(id=3),
    "parameters are a list": adding(parameters=[1]),
    "a parameter is null": adding(parameters={"a": None}),
    "a parameter is an object": adding(parameters={"a": {}}),
    "outputs are a text": adding(outputs="x"),
    "an output without a name": adding(outputs=[{}]),
    "an unknown output": adding(outputs=[{"name": "X"}]),
    "binary_data is a number": asking({"binary_data": 1}),
    "classes less than 0": asking({"classification": -1}),
    "classes as a text": asking({"classification": "1"}),
    "an output in an unknown region": asking({"shared_memory_region": "r", "shared_memory_byte_size": 8}),
    "an input in an unknown region": changed(
        data=None, parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8}
    ),
    "two places for data": changed(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8}),
    "no place for data": changed(data=None),
    "a size without binary data": changed(data=None, parameters={"binary_data_size": 8}),
    "a size as a text": changed(data=None, parameters={"binary_data_size": "8"}),
    # what is wrong with a tensor
    "no name": changed(name=None),
    "no datatype": changed(datatype=None),
    "no shape": changed(shape=None),
    "a name is a number": changed(name=3),
    "an unknown input": changed(name="X"),
    "an input twice": changed(name="INPUT1"),
    "a missing input": {"inputs": adding()["inputs"][:1]},
    "an unknown datatype": changed(datatype="XX"),
    "another datatype": changed(datatype="INT64", data=[1, 2]),
    "FP16 in JSON": changed(datatype="FP16"),
    "an axis too many": changed(shape=[1, 2, 1]),
    "too large a batch": adding((65, 1)),
    "a negative size": changed(shape=[-1, 2]),
    "a size that is a text": changed(shape=["a"]),
    "shape is a number": changed(shape=2),
    "too few values": changed(data=[1]),
    "too many values": changed(data=[1, 2, 3]),
    "values that are texts": changed(data=["a", "b"]),
    "values that are booleans": changed(data=[True, False]),
    "a value is null": changed(data=[None, 1]),
    "data is a number": changed(data=3),
    "nested data": changed(data=[[1, 2]]),
    "the model's own error": {"inputs": [each | {"shape": [1, 1], "data": [-1]} for each in adding()["inputs"]]},
}
_PARAMETERS: tuple[tuple[str, Any], ...] = (
    *(("priority", 1), ("timeout", 0), ("sequence_id", 1), ("sequence_id", "a"), ("sequence_start", True)),
    ("headers", "x"),
)
_WRONG_PARAMETERS: tuple[tuple[str, Any], ...] = (
    *(("priority", value) for value in (-1, "x", 1.5)),
    *(("timeout", value) for value in (-1, "1")),
    *(("sequence_start", 1), ("sequence_end", "x"), ("binary_data_output", 1)),
)
_GENERATES: tuple[Any, ...] = (
    *({"text_input": "x"}, {"text_input": "x", "max_tokens": 3}, {"text_input": ["x"]}, {"text_input": ["x", "y"]}),
    {"text_input": "x", "foo": 1, "parameters": {"bar": True, "s": "t", "f": 1.5}},
    *({"text_input": "x", "id": 7}, {"text_input": "x", "max_tokens": "3"}, {"text_input": "x", "foo": {"a": 1}}),
    *({"text_input": "x", "foo": None}, {"text_input": "x", "foo": [1]}, {"text_input": "x", "parameters": [1]}),
    *({"text_input": None}, {"text_input": 5}, {"text_input": {}}, []),
)
_COUNTS = (0, 1, 3, -2)
MANY_INPUTS = "[request id: <id_unknown>] expected 2 inputs but got 3 inputs for model 'add'. Got input(s)"
SAME: dict[str, Ask] = {
    **{name: Ask(ADD, body) for name, body in _BODIES.items()},
    **{f"{key} {value!r}": Ask(ADD, adding(parameters={key: value})) for key, value in _PARAMETERS},
    "binary inputs": binary(),
    "binary inputs and outputs": binary(parameters={"binary_data_output": True}),
    "bytes too many": binary(tail=b"xx"),
    "bytes too few": binary(size=20),
    **{f"a body packed by {name}": binary(packed=name) for name in ("gzip", "deflate")},
    **{
        f"accepts {accepts}": binary(accepts=accepts, parameters={"binary_data_output": True})
        for accepts in ("gzip", "deflate", "gzip, deflate", "deflate;q=0.5,gzip;q=0.2", "*", "br", "identity")
    },
    "an unknown packing": Ask(ADD, adding(), (("content-encoding", "br"),)),
    "nothing packed": Ask(ADD, adding(), (("content-encoding", "identity"),)),
    "a header longer than the body": Ask(ADD, adding(), ((HEADER_LENGTH, "100000"),)),
    "a raw body for a model of two inputs": Ask(ADD, adding(), ((HEADER_LENGTH, "0"),)),
    "no body": Ask(ADD),
    "GET": Ask(ADD, method="GET"),
    "PUT": Ask(ADD, adding(), method="PUT"),
    "a version": Ask("/v2/models/add/versions/1/infer", adding()),
    "an unknown version": Ask("/v2/models/add/versions/2/infer", adding()),
    "no version": Ask("/v2/models/add/versions/x/infer", adding()),
    "an unknown model": Ask("/v2/models/nope/infer", adding()),
    "a path too long": Ask(f"{ADD}/", adding()),
    "a query": Ask(f"{ADD}?x=1", adding()),
    "a decoupled model": Ask("/v2/models/decoupled/infer", {"inputs": [DECOUPLED_INPUT]}),
    "all that JSON escapes": Ask(TEXT, text('ü \u0001 " \\ / \x7f')),
    "a text that is a number": Ask(TEXT, text(3)),
    "parameters of texts": Ask(TEXT, text("a", parameters={"a": 1, "b": "x", "c": True, "d": 1.5})),
    **{
        f"raw text {raw!r}": raw_text(raw)
        for raw in (b"\1\0\0\0a", b"\1\0\0\0", b"\2\0\0\0a", b"\1\0\0\0a\1\0\0\0b", b"", b"\1\0\0")
    },
    "large integers": same_type("UINT64", [1, 2**63, 3]),
    "integers that are fractions": same_type("UINT64", [1.5]),
    "a raw body": Ask("/v2/models/id_fp16/infer", b"\0\x3c\0\0", ((HEADER_LENGTH, "0"),)),
    **{
        f"{route} {json.dumps(body)}": Ask(GENERATE + route, body)
        for route in ("", "_stream")
        for body in _GENERATES
    },
    **{f"generate of {what}": Ask(f"/v2/models/{what}/generate", {"text_input": "x"})
       for what in ("nope", "text/versions/1", "text/versions/9")},
    "generate by GET": Ask(GENERATE, method="GET"),
    "generate sums": Ask("/v2/models/add/generate", {"INPUT0": [1, 2], "INPUT1": [3, 4]}),
    **{f"stream {count}": Ask("/v2/models/decoupled/generate_stream", {"IN": count}) for count in _COUNTS},
    "one of one response": Ask("/v2/models/decoupled/generate", {"IN": 1}),
}  # fmt: skip
OWN_ERROR = "this is the model's own error"
ONE_RESPONSE = "generate expects model to produce exactly 1 response"
MUST_SIZE = "'shared_memory_byte_size' must be specified along with 'shared_memory_region'"
DIFFERENT: dict[str, tuple[Ask, str, str]] = {
    # what is read is the same; how the reader says that it is none is its own
    "malformed": (
        Ask(ADD, b"{"),
        "500 failed to parse the request JSON buffer: ",
        "400 failed to parse the request JSO",
    ),
    "bad generate": (Ask(GENERATE, b"{"), "500 failed to parse the request JSON", "400 failed to parse the request JS"),
    # what Triton has refused since this one
    "an output twice": (
        Ask(ADD, adding(outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT1"}])),
        "200 ",
        "400 output 'OUTPUT1' already exists in request",
    ),
    # a clear refusal instead of a guess
    "parameters of an output": (Ask(ADD, asking([])), "200 ", "400 failed to get output params.: "),  # type: ignore[arg-type]
    "a region without a size": (
        Ask(ADD, asking({"shared_memory_region": "r"})),
        "404 Unable to find shared memory region: 'r'",
        f"400 {MUST_SIZE}",
    ),
    "a size without a region": (Ask(ADD, asking({"shared_memory_byte_size": 8})), "200 ", "400 'shared_memory_byte_"),
    "a header that is no number": (
        Ask(ADD, adding(), ((HEADER_LENGTH, "x"),)),
        "400 [request id",
        "400 inference header",
    ),
    "not packed": (
        Ask(ADD, b"x", (("content-encoding", "gzip"),)),
        "400 [request id",
        "400 the request body is not gzip",
    ),
    "a size that does not fit": (
        binary(size=4),
        "400 unexpected additional",
        "400 [request id: <id_unknown>] input byte",
    ),
    "negative and unsigned": (
        same_type("UINT64", [-1]),
        "500 Unable to parse 'data'",
        "400 Unable to parse 'data': a va",
    ),
    "priority of generate": (Ask(GENERATE, {"text_input": "x", "priority": "1"}), "200 ", "400 invalid value type"),
    # the protocol's own parameters are checked once for all transports, with the texts of gRPC
    **{
        f"{key} {value!r}": (
            Ask(ADD, adding(parameters={key: value})),
            f"500 Unable to parse '{key}': attempt",
            "400 invalid value",
        )
        for key, value in _WRONG_PARAMETERS
    },
    "a reserved parameter": (
        Ask(ADD, adding(parameters={"triton_x": 1})),
        "400 parameter keys starting with 'triton_' are reserved for Triton usage and",
        "400 parameter keys starting with 'triton_' are reserved for Triton usage. Only",
    ),
    # inputs are looked at in their order, not in a hash table's
    "too many inputs": (
        Ask(ADD, {"inputs": [*adding()["inputs"], DECOUPLED_INPUT]}),
        f"400 {MANY_INPUTS} ['IN','INPUT1','INPUT0'], but missing required input(s) ].",
        f"400 {MANY_INPUTS} ['INPUT0','INPUT1','IN'], but missing required input(s) [].",
    ),
    **{
        name: (Ask(ADD, body), f"400 {OTHER_BATCH % 'INPUT0'}", f"400 {OTHER_BATCH % 'INPUT1'}")
        for name, body in (
            ("an axis too few", changed(shape=[2])),
            ("another batch size", changed(shape=[2, 2], data=[1, 2, 3, 4])),
        )
    },
    "reserved in generate": (Ask(GENERATE, {"text_input": "x", "triton_x": 1}), "200 ", "400 parameter keys starting"),
    # an error has the status of an error
    "no response": (
        Ask("/v2/models/decoupled/generate", {"IN": 0}),
        f"200 {{'error': '{ONE_RESPONSE}",
        "400 generate exp",
    ),
    "many responses": (
        Ask("/v2/models/decoupled/generate", {"IN": 2}),
        "200 {'error': 'generate exp",
        "400 generate exp",
    ),
    "an error first": (Ask("/v2/models/decoupled/generate", {"IN": -1}), f"400 {OWN_ERROR}", f"500 {OWN_ERROR}"),
    # what Triton cannot do and does no harm
    "packed generate": (
        Ask(GENERATE, gzip.compress(b'{"text_input":"x"}'), (("content-encoding", "gzip"),)),
        "400 Unsupported content-encoding, only 'identity' is supported.",
        "200 ",
    ),
    "an escaped name": (Ask("/v2/models/a%64d/infer", adding()), "404 Request for unknown model: 'a%64d'", "200 "),
}
