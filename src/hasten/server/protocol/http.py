"""Triton's HTTP routes: its operations with JSON for their messages, beside those that compute."""

import base64
import binascii
import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp
from tritonclient.grpc import service_pb2 as pb

from hasten.server.by_size import SMALL, by_size
from hasten.server.errors import CLIENT_GONE, client_error, error_response, service_error_response
from hasten.server.inflight import InflightBytes
from hasten.server.json_size import check_declared_size
from hasten.server.openapi.operation import Operation, described
from hasten.server.protocol.bodies import dump_json, parse_object
from hasten.server.protocol.http_infer import InferRoutes, named_model
from hasten.server.protocol.operations import Handler, LoadRequest, Operations
from hasten.server.security import Admission, Guard
from hasten.server.types import invalid

Fields = dict[str, Any]
"""Of an operation's request."""

_MAX_LOAD_BYTES = 16 << 20
"""Of a body of JSON with a model's files, which come as long texts; over gRPC they are bytes, and may be more."""
_BASE64_PIECE = 1 << 20
"""Characters, a multiple of the four that become three bytes."""
_LARGEST_UNSIGNED = 2**64 - 1


async def _nothing(_: Request) -> Fields:
    return {}


def _shown(message: Any) -> Response:
    return _json(to_json(message))


def _done(_: Any) -> Response:
    return Response(media_type="application/json")


@dataclass(frozen=True)
class _Row:
    """An operation over HTTP."""

    paths: tuple[str, ...]
    call: str
    summary: str
    read: Callable[[Request], Awaitable[Fields]] = _nothing
    show: Callable[[Any], Response] = _shown
    methods: tuple[str, ...] = ("GET",)


def _ready(message: Any) -> Response:
    return Response(status_code=200 if message.ready else 400)


def _model_ready(message: Any) -> Response:
    if not message.ready:
        raise invalid("Model version not ready")
    return Response()


def _entries(message: Any) -> Response:
    return _json([{field: value for field, value in to_json(each).items() if value} for each in message.models])


def _regions(message: Any) -> Response:
    return _json([to_json(message.regions[name]) for name in sorted(message.regions)])


def _traces(message: Any) -> Response:
    settings = {key: list(setting.value) for key, setting in sorted(message.settings.items())}
    return _json({key: values if key == "trace_level" else values[0] for key, values in settings.items()})


def http_routes(operations: Operations, max_request_bytes: int) -> list[Route]:
    """All of Triton's HTTP routes."""
    infer = InferRoutes(operations.service, operations.memory, max_request_bytes)
    rows = [_route(operations.handlers[row.call], row, path) for row in _ROWS for path in row.paths]

    async def logging(request: Request) -> Response:
        if request.method == "POST":
            operations.logs.update(await _object(request))
        return _json(operations.logs.get())

    described(logging, Operation("Log settings; POST changes them"))
    return [*infer.routes(), *rows, Route("/v2/logging", logging, methods=["GET", "POST"])]


def _route(handle: Handler, row: _Row, path: str) -> Route:
    kind = LoadRequest if row.call == "RepositoryModelLoad" else getattr(pb, f"{row.call}Request")

    async def endpoint(request: Request) -> Response:
        response = handle(kind(**await row.read(request)))
        return row.show(await response if inspect.isawaitable(response) else response)

    return Route(path, described(endpoint, Operation(row.summary)), methods=list(row.methods))


async def _model(request: Request) -> Fields:
    name, version = named_model(request)
    return {"name": name, "version": version}


async def _index(request: Request) -> Fields:
    only_ready = (await _object(request)).get("ready", False)
    if not isinstance(only_ready, bool):
        raise invalid("attempt to access JSON non-boolean as boolean")
    return {"ready": only_ready}


async def _load(request: Request) -> Fields:
    parameters = await _repository_parameters(request, "load", _MAX_LOAD_BYTES)
    config = parameters.pop("config", None)
    if config is not None and not isinstance(config, str):
        raise invalid("attempt to access JSON non-string as string")
    sent = {key: text for key, text in parameters.items() if _is_file(key)}
    size = sum(len(text) for text in sent.values() if isinstance(text, str))
    files = await by_size(size, lambda: {key.removeprefix("file:"): _decoded(key, text) for key, text in sent.items()})
    repository = request.path_params.get("repository", "")
    return {"model": request.path_params["model"], "config": config, "files": files, "repository": repository}


async def _unload(request: Request) -> Fields:
    with_dependents = (await _repository_parameters(request, "unload")).get("unload_dependents", False)
    if not isinstance(with_dependents, bool):
        raise invalid("attempt to access JSON non-boolean as boolean")
    parameters = {"unload_dependents": {"bool_param": with_dependents}}
    names = {"repository_name": request.path_params.get("repository", ""), "model_name": request.path_params["model"]}
    return {**names, "parameters": parameters}


async def _region(request: Request) -> Fields:
    return {"name": request.path_params.get("region", "")}


async def _register(request: Request) -> Fields:
    body = await _object(request)
    for field in ("key", "byte_size"):
        if field not in body:
            raise invalid(f"Shared memory register request has no '{field}' field")
    if not isinstance(body["key"], str):
        raise invalid("attempt to access JSON non-string as string")
    numbers = {"offset": body.get("offset", 0), "byte_size": body["byte_size"]}
    if not all(type(number) is int and 0 <= number <= _LARGEST_UNSIGNED for number in numbers.values()):
        raise invalid("attempt to access JSON non-unsigned-integer as unsigned-integer")
    return {**await _region(request), "key": body["key"], **numbers}


async def _trace_settings(request: Request) -> Fields:
    body = await _object(request) if request.method == "POST" else {}
    settings = {key: {"value": _trace_values(key, value)} for key, value in body.items()}
    return {"model_name": request.path_params.get("model", ""), "settings": settings}


def _trace_values(key: str, value: Any) -> list[str]:
    """The values of a setting; none set it back."""
    values = [] if value is None else value if key == "trace_level" else [value]
    if not isinstance(values, list):
        raise invalid("attempt to access JSON non-array as array")
    if not all(isinstance(text, str) for text in values):
        raise invalid("attempt to access JSON non-string as string")
    return values


_MODELS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
_REPOSITORIES = ("/v2/repository", "/v2/repository/{repository}")
_POST, _BOTH = ("POST",), ("GET", "POST")


def _each(roots: Iterable[str], end: str) -> tuple[str, ...]:
    return tuple(root + end for root in roots)


def _memory(kind: str, end: str) -> tuple[str, ...]:
    return _each((f"/v2/{kind}sharedmemory", f"/v2/{kind}sharedmemory/region/{{region}}"), end)


_ROWS = (
    _Row(("/v2",), "ServerMetadata", "Name, version and extensions"),
    _Row(("/v2/health/live",), "ServerLive", "Whether the server runs",
         show=lambda message: Response(status_code=200 if message.live else 400)),
    _Row(("/v2/health/ready",), "ServerReady", "Whether all models are ready", show=_ready),
    _Row(("/health", "/ping"), "ServerReady",
         "Whether all models are ready, in the status codes that load balancers expect",
         show=lambda message: Response(status_code=200 if message.ready else 503)),
    _Row(("/version",), "ServerMetadata", "The server's version",
         show=lambda message: _json({"version": message.version})),
    _Row(("/v2/trace/setting", "/v2/models/{model}/trace/setting"), "TraceSetting",
         "Trace settings of a model, or of all; POST changes them", _trace_settings, _traces, _BOTH),
    _Row(("/v2/models/stats",), "ModelStatistics", "What was counted of all models"),
    _Row(_MODELS, "ModelMetadata", "A model's tensors", _model),
    _Row(_each(_MODELS, "/ready"), "ModelReady", "Whether one model is ready", _model, _model_ready),
    _Row(_each(_MODELS, "/config"), "ModelConfig", "A model's configuration", _model,
         lambda message: _shown(message.config)),
    _Row(_each(_MODELS, "/stats"), "ModelStatistics", "What was counted of one model", _model),
    _Row(_each(_REPOSITORIES, "/index"), "RepositoryIndex", "All models and their states", _index, _entries, _POST),
    _Row(_each(_REPOSITORIES, "/models/{model}/load"), "RepositoryModelLoad", "Load a model, or load it again",
         _load, _done, _POST),
    _Row(_each(_REPOSITORIES, "/models/{model}/unload"), "RepositoryModelUnload", "Unload a model",
         _unload, _done, _POST),
    _Row(_memory("system", "/status"), "SystemSharedMemoryStatus", "The regions of shared memory", _region, _regions),
    _Row(_memory("system", "/register"), "SystemSharedMemoryRegister", "Take a region of shared memory",
         _register, _done, _POST),
    _Row(_memory("system", "/unregister"), "SystemSharedMemoryUnregister", "Forget one region, or all",
         _region, _done, _POST),
    _Row(_memory("cuda", "/status"), "CudaSharedMemoryStatus", "There are no regions of CUDA shared memory",
         _region, _regions),
    _Row(_memory("cuda", "/register"), "CudaSharedMemoryRegister", "Not supported", methods=_POST),
    _Row(_memory("cuda", "/unregister"), "CudaSharedMemoryUnregister", "Forgetting what is not there is no error",
         show=_done, methods=_POST),
)  # fmt: skip


async def _object(request: Request, *, max_bytes: int = SMALL) -> dict[str, Any]:
    """The JSON object of a body of at most `max_bytes`."""
    check_declared_size(request.headers.get("content-length"), max_bytes=max_bytes)
    body = await request.body()
    return await by_size(len(body), parse_object, body, max_bytes=max_bytes)


def _json(value: object) -> Response:
    return Response(dump_json(value), media_type="application/json")


async def _repository_parameters(request: Request, action: str, max_bytes: int = SMALL) -> dict[str, Any]:
    parameters = (await _object(request, max_bytes=max_bytes)).get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid("attempt to get members for non-object")
    for key in parameters:
        if key not in ("config", "unload_dependents") and not _is_file(key):
            raise invalid(f"unrecognized {action} parameter '{key}'.")
    return parameters


def _is_file(key: str) -> bool:
    return key.startswith("file:")


def _decoded(key: str, text: Any) -> bytes:
    """The bytes of a file, decoded in pieces between which other threads run."""
    try:
        if isinstance(text, str) and "=" not in text[:-2]:
            pieces = range(0, len(text), _BASE64_PIECE)
            return b"".join(base64.b64decode(text[at : at + _BASE64_PIECE], validate=True) for at in pieces)
    except (ValueError, binascii.Error):
        pass
    raise invalid(f"load parameter '{key}' is not base64 text")


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    if isinstance(error, HTTPException):
        return error_response(request.url.path, error.status_code, error.detail)
    return service_error_response(request.url.path, client_error(error, f"{request.method} {request.url.path}"))


def http_app(
    routes: Sequence[BaseRoute],
    admission: Admission,
    max_request_bytes: int,
    inflight: InflightBytes | None = None,
) -> ASGIApp:
    """The application of these routes, behind its guard.

    `inflight` bounds what all requests hold, of this and of other applications.
    """
    app = Starlette(routes=list(routes))
    app.router.redirect_slashes = False
    # starlette's own handling of unforeseen errors would also close the client's connection
    app.middleware_stack = ExceptionMiddleware(app.router, {HTTPException: _failed, Exception: _failed})
    return Guard(app, admission, max_request_bytes, inflight or InflightBytes())


def to_json(message: Any) -> dict[str, Any]:
    """A message as plain values for JSON, the way Triton writes them.

    Every field in the order of the schema, unset ones with their defaults; of messages and choices the set ones.

    Unlike protobuf's own JSON, whole numbers of 64 bits are numbers.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            values[field.name] = _map(field, value) if _is_map(field) else [_plain_value(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            values[field.name] = _plain_value(field, value)
    return values


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _map(field: Any, values: Any) -> dict[str, Any]:
    kind = field.message_type.fields_by_name["value"]
    return {str(key): _plain_value(kind, values[key]) for key in values}


def _plain_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value
