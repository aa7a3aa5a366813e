"""Calls over gRPC that a real Triton and hasten answer alike, and those that they answer differently for a reason.

All ask the models of `AddingService`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

PAIR = ("INPUT0", "INPUT1")
OTHER_BATCH = "[request id: <id_unknown>] input '%s' batch size does not match other inputs for 'add'"


def set_parameter(message: Any, value: Any) -> None:
    if isinstance(value, bool):
        message.bool_param = value
    elif isinstance(value, int):
        message.int64_param = value
    elif isinstance(value, float):
        message.double_param = value
    elif value is None:
        message.SetInParent()
    else:
        message.string_param = value


FLOATS = np.array([0, 1], np.float32).tobytes()
Input = tuple[str, str, list[int], bytes | dict[str, list[Any]] | None, dict[str, Any]]
"""Name, datatype, shape, raw or typed contents, parameters."""
BOTH: tuple[Input, ...] = tuple((name, "FP32", [1, 2], FLOATS, {}) for name in PAIR)


def infer(
    model: str = "add",
    inputs: Sequence[Input] = BOTH,
    outputs: Mapping[str, Mapping[str, Any]] | None = None,
    version: str = "",
    request_id: str = "",
    more: bytes = b"",
    **parameters: Any,
) -> Any:
    """A ModelInferRequest."""
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, datatype, shape, contents, given in inputs:
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
        for key, value in given.items():
            set_parameter(tensor.parameters[key], value)
        if isinstance(contents, dict):
            for field, values in contents.items():
                getattr(tensor.contents, field).extend(values)
        elif contents is not None:
            message.raw_input_contents.append(contents)
    message.raw_input_contents.extend([more] if more else [])
    for name, wanted in (outputs or {}).items():
        output = message.outputs.add(name=name)
        for key, value in wanted.items():
            set_parameter(output.parameters[key], value)
    for key, value in parameters.items():
        set_parameter(message.parameters[key], value)
    return message


def first(
    name: str = "INPUT0", datatype: str = "FP32", shape: Sequence[int] = (1, 2), contents: Any = FLOATS, **given: Any
) -> Any:
    """The same with another first input."""
    return infer(inputs=[(name, datatype, list(shape), contents, given), ("INPUT1", "FP32", [1, 2], FLOATS, {})])


def typed(**contents: list[Any]) -> Any:
    """The same with typed contents."""
    return infer(inputs=[(name, "FP32", [1, 2], dict(contents), {}) for name in PAIR])


def count(number: int, **parameters: Any) -> Any:
    """A request for so many responses."""
    raw = np.array([number], np.int32).tobytes()
    return infer("decoupled", [("IN", "INT32", [1], raw, {})], request_id="i", **parameters)


def say(contents: Any) -> Any:
    """A request to the model of text."""
    return infer("text", [("text_input", "BYTES", [1], contents, {})])


_REGION: dict[str, Any] = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
_WRONG_PARAMETERS: tuple[tuple[str, Any], ...] = (
    *(("priority", value) for value in (1, -1, "x", True)),
    *(("timeout", value) for value in (5_000_000, "1")),
    *(("sequence_id", value) for value in (1, "a", True)),
    *(("sequence_start", value) for value in (True, 1)),
    *(("sequence_end", "x"), ("headers", "x"), ("a", None), ("triton_x", 1)),
    *(("triton_enable_empty_final_response", value) for value in (True, 1)),
)
SAME: dict[str, Any] = {
    "plain": infer(),
    "id": infer(request_id="x"),
    "parameters": infer(a=1, b="x", c=True, d=1.5),
    **{f"{key} {value!r}": infer(**{key: value}) for key, value in _WRONG_PARAMETERS},
    "an output": infer(outputs={"OUTPUT1": {}}),
    "an unknown output": infer(outputs={"X": {}}),
    **{f"classes {value!r}": infer(outputs={"OUTPUT0": {"classification": value}}) for value in (1, 2, 9, 0, -1, "1")},
    "an output's own parameter": infer(outputs={"OUTPUT0": {"foo": 1}}),
    "an output in an unknown region": infer(outputs={"OUTPUT0": _REGION}),
    "an output in a region without a size": infer(outputs={"OUTPUT0": {"shared_memory_region": "r"}}),
    **{f"an output with {key} alone": infer(outputs={"OUTPUT0": {key: 8}})
       for key in ("shared_memory_byte_size", "shared_memory_offset")},
    "a region that is a number": infer(outputs={"OUTPUT0": {"shared_memory_region": 3}}),
    "classes in a region": infer(outputs={"OUTPUT0": _REGION | {"classification": 1}}),
    "an input in an unknown region": first(contents=None, **_REGION),
    "raw contents and a region": first(**_REGION),
    "typed contents and a region": first(contents={"fp32_contents": [1, 2]}, **_REGION),
    "typed contents": typed(fp32_contents=[1, 2]),
    "typed contents of another type": typed(int_contents=[1, 2]),
    "typed contents of two types": typed(fp32_contents=[1, 2], int_contents=[1, 2]),
    "typed and raw contents": first(contents={"fp32_contents": [1, 2]}),
    "no contents": typed(),
    "too few raw contents": infer(
        inputs=[(name, "FP32", [1, 2], raw, {}) for name, raw in (("INPUT0", FLOATS), ("INPUT1", None))]
    ),
    "too many raw contents": infer(more=b"xx"),
    **{f"raw contents of {size} bytes": first(contents=b"x" * size) for size in (0, 4, 12)},
    "an unknown model": infer("nope"),
    "no model": infer(""),
    **{f"version {version!r}": infer(version=version) for version in ("1", "9", "x", "0", "-1")},
    "an unknown input": first("X"),
    "an input twice": first("INPUT1"),
    "a missing input": infer(inputs=[("INPUT0", "FP32", [1, 2], FLOATS, {})]),
    "no inputs": infer(inputs=[]),
    **{f"datatype {kind!r}": first(datatype=kind) for kind in ("INT32", "XX", "")},
    "texts for numbers": first(datatype="BYTES", contents=b"\1\0\0\0a\1\0\0\0b"),
    "an axis too many": first(shape=(1, 2, 1)),
    "too large a batch": infer(inputs=[(name, "FP32", [65, 1], b"x" * 260, {}) for name in PAIR]),
    "the model's own error": infer(
        inputs=[(name, "FP32", [1, 1], np.array([-1], np.float32).tobytes(), {}) for name in PAIR]
    ),
    "a decoupled model": count(1),
    **{f"text {raw!r}": say(raw) for raw in (b"\1\0\0\0a", b"\1\0\0\0", b"\1\0\0\0a\1\0\0\0b", b"", b"\1\0\0")},
    **{f"typed text {words!r}": say({"bytes_contents": words}) for words in ([b"a"], [b"a", b"b"], [])},
    "FP16": infer("id_fp16", [("IN", "FP16", [2], b"\0\x3c\0\0", {})]),
    "classes of FP16": infer(
        "id_uint64", [("IN", "UINT64", [2], b"\xff" * 8 + b"\0" * 8, {})], {"OUT": {"classification": 1}}
    ),
}  # fmt: skip
DIFFERENT: dict[str, tuple[Any, str, str]] = {
    # numbers are read to their end
    "a version with a fraction": (infer(version="1.5"), "OK", "INVALID_ARGUMENT failed to get model version"),
    # shapes are looked at before what depends on them
    "no axes": (
        first(shape=()),
        "INVALID_ARGUMENT [request id: <id_unknown>] input 'INPUT0' has no sh",
        "INVALID_ARGUMENT ",
    ),
    "an open axis": (
        first(shape=(1, -1)),
        "INVALID_ARGUMENT [request id: <id_",
        "INVALID_ARGUMENT invalid shape [1,-1]",
    ),
    "a negative axis": (
        first(shape=(1, -2)),
        "INVALID_ARGUMENT [request id: <id_",
        "INVALID_ARGUMENT invalid shape [1,-",
    ),
    "a huge axis": (
        first(shape=(1, 2**40)),
        "INVALID_ARGUMENT [request id: <id_",
        "INVALID_ARGUMENT invalid shape [1,1",
    ),
    # inputs are looked at in their order, not in a hash table's
    **{
        name: (
            message,
            f"INVALID_ARGUMENT {OTHER_BATCH % 'INPUT0'}",
            f"INVALID_ARGUMENT {OTHER_BATCH % 'INPUT1'}",
        )
        for name, message in (
            ("an axis too few", first(shape=(2,))),
            ("another batch size", first(shape=(2, 2), contents=2 * FLOATS)),
        )
    },
    "no batch": (
        infer(inputs=[(name, "FP32", [0, 2], b"", {}) for name in PAIR]),
        "INVALID_ARGUMENT [request id: <id_unknown>] input byte size mismatch for input 'INPUT1'",
        "INVALID_ARGUMENT [request id: <id_unknown>] input byte size mismatch for input 'INPUT0'",
    ),
    # nobody waits for less than no time
    "timeout": (infer(timeout=-1), "OK", "INVALID_ARGUMENT invalid value for 'timeout', expected value >= 0."),
    "reserved": (infer(binary_data_output=1), "OK", "INVALID_ARGUMENT invalid value type for 'binary_data_output'"),
}
