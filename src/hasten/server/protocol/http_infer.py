"""The HTTP routes that compute: infer, generate and generate_stream.

Triton's generate extension has an inference as one flat JSON object each way.
"""

import sys
import zlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import HastenError
from hasten.server.by_size import by_size
from hasten.server.errors import service_error
from hasten.server.json_size import check_declared_size
from hasten.server.protocol.bodies import (
    DuplicateKeyError,
    InferBody,
    checked_parameters,
    dump_json,
    infer_body,
    infer_response,
    parse_object,
    raw_body,
)
from hasten.server.protocol.shared_memory import SharedMemory, delivery
from hasten.server.protocol.tensors import byte_size, elements_json, flatten, from_list, texts_of
from hasten.server.sse import BodyWriter, EventStream, unless_gone
from hasten.server.types import ErrorKind, InferRequest, InferResponse, Parameter, ServiceError, Tensor, invalid

if TYPE_CHECKING:
    from hasten.server.service import Service

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


HEADER_LENGTH = "Inference-Header-Content-Length"
_MOST_DIGITS = 18
_DECOUPLED = "HTTP end point doesn't support models with decoupled transaction policy"
_WINDOW = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


class InferRoutes:
    """The routes under /v2/models/NAME that compute something."""

    def __init__(self, service: "Service", memory: SharedMemory, max_request_bytes: int) -> None:
        self._service = service
        self._memory = memory
        self._max_request_bytes = max_request_bytes

    def routes(self) -> list[Route]:
        """For every model with and without a version."""
        actions = {"infer": self.infer, "generate": self.generate, "generate_stream": self.generate_stream}
        return [
            Route(f"/v2/models/{{model}}{version}/{name}", endpoint, methods=["POST"])
            for name, endpoint in actions.items()
            for version in ("", "/versions/{version}")
        ]

    async def infer(self, request: Request) -> Response:
        """One request, one response."""
        model, version = named_model(request)
        if self._service.is_decoupled(model, version):
            raise ServiceError(ErrorKind.UNSUPPORTED, _DECOUPLED)
        raw = await request.body()
        encoded = "content-encoding" in request.headers  # what is packed may become any size
        body = await by_size(sys.maxsize if encoded else len(raw), self._infer_body, model, version, raw, request)
        deliver = delivery(body.request.outputs, self._memory, batched=self._batched(model, version))
        response = await unless_gone(request.scope, self._service.infer(body.request))

        def answer() -> Response:
            return _infer_answer(request, *infer_response(response, body, deliver(response)))

        return await by_size(byte_size(response.outputs), answer)

    def _infer_body(self, model: str, version: str, raw: bytes, request: Request) -> InferBody:
        raw = self._decompressed(raw, request)
        length = request.headers.get(HEADER_LENGTH)
        if not raw or length == "0":
            metadata = self._service.model_metadata(model, version)
            return raw_body(model, version, raw, metadata, batched=self._batched(model, version))
        read = self._memory.reader(request.state.claim)
        if length is None:
            return infer_body(model, version, raw, None, read)
        if not _is_number(length) or int(length) > len(raw):
            raise invalid(f"inference header size should be in range (0, {len(raw)}), got: {length}")
        return infer_body(model, version, raw, int(length), read)

    def _decompressed(self, raw: bytes, request: Request) -> bytes:
        body = decompressed(raw, request.headers.get("content-encoding", ""), self._max_request_bytes)
        if body is not raw:
            request.state.claim.grow(len(body))
        return body

    def _batched(self, model: str, version: str) -> bool:
        return bool(self._service.model_config(model, version).max_batch_size > 0)

    async def _generate_request(self, request: Request) -> InferRequest:
        model, version = named_model(request)
        encoded = "content-encoding" in request.headers
        if not encoded:
            check_declared_size(request.headers.get("content-length"))
        raw = await request.body()
        return await by_size(sys.maxsize if encoded else len(raw), self._parsed_generate, model, version, raw, request)

    def _parsed_generate(self, model: str, version: str, raw: bytes, request: Request) -> InferRequest:
        metadata = self._service.model_metadata(model, version)
        try:
            body = parse_object(self._decompressed(raw, request))
        except DuplicateKeyError as error:
            kind = "input" if any(spec.name == error.key for spec in metadata.inputs) else "parameter"
            raise invalid(f"{kind} '{error.key}' already exists in request") from None
        return generate_request(model, version, body, metadata, batched=self._batched(model, version))

    async def generate(self, request: Request) -> Response:
        """The one response of a request, as a flat JSON object."""
        wanted = await self._generate_request(request)
        response = await unless_gone(request.scope, self._only_response(wanted))
        return Response(await _generate_json(response), media_type="application/json")

    async def _only_response(self, request: InferRequest) -> InferResponse:
        found: list[InferResponse] = []
        async with aclosing(self._service.stream(request)) as responses:
            async for response in responses:
                if response.outputs:
                    found.append(response)
                if len(found) > 1:
                    break
        if len(found) != 1:
            raise invalid(ONE_RESPONSE)
        return found[0]

    async def generate_stream(self, request: Request) -> Response:
        """All responses of a request, as server-sent events."""
        wanted = await self._generate_request(request)
        return await EventStream.of(request, _ResponseEvents(self._service.stream(wanted)))


class _ResponseEvents:
    """Responses as events; see Events."""

    def __init__(self, responses: AsyncGenerator[InferResponse, None]) -> None:
        self._responses = responses

    async def first(self) -> bytes:
        """See Events."""
        async for response in self._responses:
            if response.outputs:
                return _event(await _generate_json(response))
        return b""

    async def write(self, body: BodyWriter) -> None:
        """See Events."""
        try:
            while event := await self.first():
                body.write(event)
                if not body.writable:
                    await body.drain()
        except HastenError as error:
            body.write(_event(dump_json({"error": str(service_error(error))})))

    async def close(self) -> None:
        """See Events."""
        await self._responses.aclose()


async def _generate_json(response: InferResponse) -> bytes:
    return await by_size(byte_size(response.outputs), generate_json, response)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_model(request: Request) -> tuple[str, str]:
    """Model and version of a request's path; an empty version is the newest. What is no number is no path."""
    version: str = request.path_params.get("version", "0")
    if not _is_number(version):
        raise HTTPException(404)
    return request.path_params["model"], request.path_params.get("version", "")


def _is_number(text: str) -> bool:
    """Whether it is a whole number that is not larger than anybody means."""
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """The body behind Content-Encoding; INVALID where it is not what it says, or larger than `limit` bytes."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW:
        raise ServiceError(ErrorKind.UNSUPPORTED, "Unsupported compression type")
    unpacker = zlib.decompressobj(_WINDOW[encoding])
    try:
        data = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise invalid(f"the request body is not {encoding} data: {error}") from None
    if len(data) > limit:
        raise invalid(f"the request body is larger than {limit} bytes when it is unpacked; see --max-request-bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise invalid(f"the request body is not {encoding} data: it is cut off, or something follows it")
    return data


def accepted_encoding(header: str) -> str:
    """The compression that a client likes best, of those there are; empty for none."""
    liked = {"identity": 0.0}
    for part in header.lower().split(","):
        name, _, options = part.strip().partition(";")
        weight = options.strip().removeprefix("q=")
        if name in _WINDOW:
            liked[name] = _number(weight) if options else 1.0
    best = max(liked, key=lambda name: liked[name])
    return best if liked[best] > 0 else ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _infer_answer(request: Request, head: bytes, raws: list[bytes]) -> Response:
    body = b"".join((head, *raws))
    headers = {"content-type": "application/octet-stream" if raws else "application/json"}
    if raws:
        headers[HEADER_LENGTH] = str(len(head))
    encoding = accepted_encoding(request.headers.get("accept-encoding", ""))
    if encoding:
        packer = zlib.compressobj(wbits=_WINDOW[encoding])
        body = packer.compress(body) + packer.flush()
        headers["content-encoding"] = encoding
    return Response(body, headers=headers)
