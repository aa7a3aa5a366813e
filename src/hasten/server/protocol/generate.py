"""Triton's generate extension: an inference as one flat JSON object each way."""

from collections.abc import Mapping
from typing import Any

import msgspec

from hasten.server.protocol.bodies import checked_parameters, dump_json
from hasten.server.protocol.tensors import elements_json, flatten, from_list, texts_of
from hasten.server.types import InferRequest, InferResponse, Parameter, Tensor, invalid

ONE_RESPONSE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various "
    "number of responses"
)


def generate_request(
    model: str, version: str, body: Mapping[str, Any], metadata: Any, *, batched: bool
) -> InferRequest:
    """The request of a generate body: fields that are inputs become tensors, others become parameters."""
    specs = {spec.name: spec for spec in metadata.inputs}
    inputs: list[Tensor] = []
    parameters: dict[str, Parameter] = {}
    for key, value in body.items():
        if key in specs:
            inputs.append(_tensor(specs[key], value, batched=batched))
        elif key == "parameters":
            if not isinstance(value, dict):
                raise invalid(
                    "Expected JSON object for keyword: 'parameters': attempt to access JSON non-object as object"
                )
            parameters |= checked_parameters(value)
        else:
            parameters |= checked_parameters({key: value})
    request_id = parameters.pop("id", "")
    if not isinstance(request_id, str):
        raise invalid("Unable to parse 'id': attempt to access JSON non-string as string")
    return InferRequest(model=model, version=version, id=request_id, parameters=parameters, inputs=inputs)


def _tensor(spec: Any, value: Any, *, batched: bool) -> Tensor:
    values = value if isinstance(value, list) else [value]
    return from_list(spec.name, spec.datatype, _shape(spec, values, batched=batched), values)


def _shape(spec: Any, values: list[Any], *, batched: bool) -> list[int]:
    """Shape of an input: that of the lists where it fits the model's, else what makes a flat list fit."""
    nested = _nested_shape(values)
    if len(nested) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, nested, strict=True)
    ):
        return nested
    shape = [1 if at == 0 and batched else size for at, size in enumerate(spec.shape)]
    count, known = len(flatten(values)), 1
    open_sizes = [at for at, size in enumerate(shape) if size < 0]
    for size in shape:
        known *= size if size > 0 else 1
    for at in open_sizes[:-1]:
        shape[at] = 1
    if open_sizes and count % known == 0:
        shape[open_sizes[-1]] = count // known
    elif open_sizes or count != known:
        raise invalid(f"The schema can not convert input '{spec.name}' to tensor with proper shape")
    return shape


def _nested_shape(values: list[Any]) -> list[int]:
    shape: list[int] = []
    level: Any = values
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    return shape


def generate_json(response: InferResponse) -> bytes:
    """A response as one JSON object: outputs by name, those of one element without a list."""
    values: dict[str, Any] = {"id": response.id} if response.id else {}
    values |= response.parameters
    values |= {output.name: _plain(output) for output in response.outputs}
    values |= {"model_name": response.model, "model_version": response.version}
    ordered = {key: values[key] for key in sorted(values)}
    return dump_json(ordered)


def _plain(output: Tensor) -> msgspec.Raw | str:
    texts = texts_of(output)
    if texts is not None and len(texts) == 1:
        return texts[0].decode(errors="replace")
    values = elements_json(output)
    return msgspec.Raw(bytes(values)[1:-1]) if output.data.size == 1 else values
