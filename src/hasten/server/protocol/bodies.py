"""Inference requests and responses to and from the bodies of HTTP: JSON, and binary tensors behind it.

Texts of errors are Triton's.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from hasten.core.errors import InvalidRequestError
from hasten.core.text import from_json
from hasten.server.json_size import MAX_JSON_BYTES, check_json_size
from hasten.server.protocol.shared_memory import BYTE_SIZE, OFFSET, REGION, Reader
from hasten.server.protocol.tensors import (
    about,
    bounded,
    check_outputs,
    dtype_of,
    elements_json,
    from_bytes,
    from_list,
    to_bytes,
)
from hasten.server.types import (
    ErrorKind,
    InferRequest,
    InferResponse,
    Parameter,
    RequestedOutput,
    ServiceError,
    Tensor,
    invalid,
)

_ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. "
)
_UNSIGNED = "non-unsigned-integer as unsigned-integer"
_KEY_END = re.compile(rb'"[ \t\r\n]*:')


class DuplicateKeyError(ServiceError):
    """A JSON object that has one key twice, which decoders would take the last value of."""

    def __init__(self, key: str) -> None:
        super().__init__(ErrorKind.INVALID, f"failed to parse the request JSON buffer: the key {key!r:.80} comes twice")
        self.key = key


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(next(key for key in counts if counts[key] > 1))
    return members


def _keys(value: Any) -> int:
    """Keys of all objects in a decoded value; lists that begin with something else are not looked through."""
    if isinstance(value, dict):
        return len(value) + sum(map(_keys, value.values()))
    return sum(map(_keys, value)) if isinstance(value, list) and value and isinstance(value[0], dict) else 0


def _check_keys(body: bytes | memoryview, decoded: Any) -> None:
    """DuplicateKeyError where an object has one key twice.

    Each key is a quote before a colon. Where the body has no more of these than the decoded value has keys, no key was
    dropped; else a slower decoder looks.
    """
    try:
        if isinstance(decoded, dict) and len(_KEY_END.findall(body)) > _keys(decoded):
            json.loads(bytes(body), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise invalid(f"failed to parse the request JSON buffer: {error}") from None


def parse_json(body: bytes | memoryview, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a body says; INVALID where it is no JSON, has a key twice or is too large to be parsed at once.

    NaN and Infinity are numbers, as for Triton.
    """
    try:
        check_json_size(body, max_bytes=max_bytes)
    except InvalidRequestError as error:
        raise invalid(f"failed to parse the request JSON buffer: {error}") from None
    decoded = _decoded(body)
    _check_keys(body, decoded)
    return decoded


def _decoded(body: bytes | memoryview) -> Any:
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        text = bytes(body)
        # its clients write NaN and Infinity; lone surrogates are what only the lenient decoder lets through
        if (b"NaN" in text or b"Infinity" in text) and b"\\u" not in text:
            try:
                return from_json(text)
            except ValueError:
                pass
        raise invalid(f"failed to parse the request JSON buffer: {error}") from None


def parse_object(body: bytes | memoryview, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A body that must be a JSON object; an empty body is an empty one."""
    value = parse_json(body, max_bytes=max_bytes) if len(body) else {}
    if not isinstance(value, dict):
        raise invalid("attempt to get members for non-object")
    return value


def dump_json(value: Any) -> bytes:
    """JSON of plain values."""
    return msgspec.json.encode(value)


@dataclass
class InferBody:
    """A request as it came over HTTP, and which outputs it wants to be binary."""

    request: InferRequest
    binary: bool = False
    """All outputs, of a request that names none."""
    binary_outputs: dict[str, bool] = field(default_factory=dict)

    def is_binary(self, output: str) -> bool:
        """Whether an output is to be sent as bytes behind the JSON."""
        return self.binary_outputs.get(output, self.binary and not self.request.outputs)


def infer_body(model: str, version: str, body: bytes, header_length: int | None, read: Reader) -> InferBody:
    """Parse a body whose first `header_length` bytes are JSON (None: all of it); INVALID where it is wrong.

    `read` reads inputs from shared memory.
    """
    whole = memoryview(body)
    head = parse_json(whole if header_length is None else whole[:header_length])
    if not isinstance(head, dict) or "inputs" not in head:
        raise invalid("Unable to parse 'inputs': attempt to access non-existing object member 'inputs'")
    request_id = _member(head, "id", str, "non-string as string", "")
    parameters = checked_parameters(head.get("parameters", {}))
    request = InferRequest(model=model, version=version, id=request_id, parameters=parameters, inputs=[])
    tail = _Tail(whole[len(body) if header_length is None else header_length :], model, request_id)
    inputs = _member(head, "inputs", list, "non-array as array", [])
    request.inputs.extend(bounded(_input(tensor, tail, read) for tensor in inputs))
    tail.close()
    result = InferBody(request, binary=parameters.get("binary_data_output") is True)
    outputs = _member(head, "outputs", list, "non-array as array", [])
    check_outputs(len(outputs))
    for output in outputs:
        _output(output, result)
    return result


def _member(holder: Mapping[str, Any], key: str, kind: type, complaint: str, default: Any) -> Any:
    value = holder.get(key, default)
    if value is None and key not in holder:
        raise invalid(f"Unable to parse '{key}': attempt to access non-existing object member '{key}'")
    if type(value) is not kind:
        raise invalid(f"Unable to parse '{key}': attempt to access JSON {complaint}")
    return value


def checked_parameters(given: Any) -> dict[str, Parameter]:
    """A request's parameters; INVALID for values that the protocol does not have."""
    if not isinstance(given, dict):
        raise invalid("failed to get request params.: attempt to get members for non-object")
    for key, value in given.items():
        if not isinstance(value, bool | int | float | str):
            raise invalid(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.")
    return dict(given)


class _Tail:
    """The bytes behind the JSON, taken by the inputs in their order."""

    def __init__(self, raw: memoryview, model: str, request_id: str) -> None:
        self._raw = raw
        self._at = 0
        self.model = model
        self.request_id = request_id

    def take(self, name: str, size: int) -> memoryview:
        taken = self._raw[self._at : self._at + size]
        if len(taken) < size:
            raise invalid(
                f"unexpected size for input '{name}', expecting {size - len(taken)} additional bytes for model "
                f"'{self.model}'"
            )
        self._at += size
        return taken

    def close(self) -> None:
        if self._at < len(self._raw):
            raise invalid(f"unexpected additional input data for model '{self.model}'")


def _input(tensor: Any, tail: _Tail, read: Reader) -> Tensor:
    given = tensor if isinstance(tensor, dict) else {}
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid("failed to get input params.: attempt to get members for non-object")
    sources = [source for source, holder in (
        ("data", given), ("binary_data_size", parameters), (REGION, parameters),
    ) if source in holder]  # fmt: skip
    if len(sources) != 1:
        found = "But set " + " ".join(f"'{source}'" for source in sources) if sources else "But no field is set"
        raise invalid(_ONE_SOURCE + found)
    name, datatype = (_member(given, key, str, "non-string as string", None) for key in ("name", "datatype"))
    shape = _member(given, "shape", list, "non-array as array", None)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise invalid(f"Unable to parse 'shape': attempt to access JSON {_UNSIGNED}")
    dtype_of(name, datatype)
    if sources == ["data"]:
        return from_list(name, datatype, shape, given["data"])
    if sources == ["binary_data_size"]:
        raw: bytes | memoryview = tail.take(name, _unsigned(parameters, "binary_data_size"))
    else:
        raw = read(name, _shared_memory(parameters)) or b""
    return from_bytes(name, datatype, shape, raw, model=tail.model, request_id=tail.request_id)


def _unsigned(parameters: Mapping[str, Any], key: str, verb: str = "parse") -> int:
    number = parameters[key]
    if type(number) is not int or number < 0:
        raise invalid(f"Unable to {verb} '{key}': attempt to access JSON {_UNSIGNED}")
    return number


def _shared_memory(parameters: Mapping[str, Any]) -> dict[str, Parameter]:
    """The parameters that speak of shared memory; INVALID unless numbers are whole and not negative."""
    numbers: dict[str, Parameter] = {
        key: _unsigned(parameters, key) for key in (BYTE_SIZE, OFFSET) if key in parameters
    }
    return numbers | {key: parameters[key] for key in (REGION,) if key in parameters}


def raw_body(model: str, version: str, body: bytes, metadata: Any, *, batched: bool) -> InferBody:
    """Triton's raw request: the body is the one input of the model, and the outputs are sent as bytes."""
    if len(metadata.inputs) != 1:
        raise invalid(
            f"{about('')}Raw request must only have 1 input (found 1) to be deduced but got {len(metadata.inputs)} "
            f"inputs in '{model}' model configuration"
        )
    spec = metadata.inputs[0]
    shape = [1 if at == 0 and batched else size for at, size in enumerate(spec.shape)]
    if spec.datatype == "BYTES":
        if any(size not in (1, -1) for size in shape):
            raise invalid(f"{about('')}For BYTE datatype raw input '{spec.name}', the model must have input shape [1]")
        text = np.empty([1] * len(shape), dtype=object)
        text.fill(body)
        tensor = Tensor.of(spec.name, "BYTES", text)
    else:
        open_sizes = [at for at, size in enumerate(shape) if size < 0]
        if len(open_sizes) > 1:
            raise invalid(f"{about('')}The shape of raw input '{spec.name}' of '{model}' cannot be deduced")
        for at in open_sizes:
            rest = math.prod(size for size in shape if size > 0) * dtype_of(spec.name, spec.datatype).itemsize
            shape[at] = len(body) // rest
        tensor = from_bytes(spec.name, spec.datatype, shape, body, model=model, request_id="")
    return InferBody(InferRequest(model=model, version=version, inputs=[tensor]), binary=True)


def _output(output: Any, body: InferBody) -> None:
    given = output if isinstance(output, dict) else {}
    name = _member(given, "name", str, "non-string as string", None)
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid("failed to get output params.: attempt to get members for non-object")
    kept: dict[str, Parameter] = _shared_memory(parameters)
    if parameters.get("classification"):
        kept["classification"] = _unsigned(parameters, "classification", "set")
    if "binary_data" in parameters:
        body.binary_outputs[name] = _member(parameters, "binary_data", bool, "non-boolean as boolean", False)
        if body.binary_outputs[name] and REGION in kept:
            raise invalid("Output can't set both 'shared_memory_region' and 'binary_data'")
    body.request.outputs.append(RequestedOutput(name, kept))


def infer_response(response: InferResponse, body: InferBody, elsewhere: set[str]) -> tuple[bytes, list[bytes]]:
    """The JSON of a response, and the binary tensors behind it; `elsewhere`: outputs that are in shared memory."""
    head: dict[str, Any] = {"id": response.id} if response.id else {}
    head |= {"model_name": response.model, "model_version": response.version}
    raws: list[bytes] = []
    head["outputs"] = outputs = []
    for output in response.outputs:
        described: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if output.name in elsewhere:
            pass
        elif body.is_binary(output.name):
            raws.append(to_bytes(output))
            described["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            described["data"] = elements_json(output)
        outputs.append(described)
    return dump_json(head), raws
