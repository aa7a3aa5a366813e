"""Triton's HTTP routes. They translate; what is asked is done by the service."""

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from hasten.server.by_size import SMALL, by_size
from hasten.server.errors import client_error
from hasten.server.http_errors import CLIENT_GONE, error_response, service_error_response
from hasten.server.inflight import InflightBytes
from hasten.server.json_size import check_declared_size
from hasten.server.protocol.bodies import dump_json, parse_object
from hasten.server.protocol.http_infer import InferRoutes, named_model
from hasten.server.protocol.proto_json import to_json
from hasten.server.protocol.settings import LogSettings, TraceSettings
from hasten.server.protocol.shared_memory import NO_CUDA, SharedMemory
from hasten.server.security import Admission, Guard
from hasten.server.types import ErrorKind, ServiceError, invalid

if TYPE_CHECKING:
    from hasten.server.service import Service

Endpoint = Callable[[Request], Awaitable[Response]]

_MODEL, _VERSION = "/v2/models/{model}", "/versions/{version}"
_MAX_LOAD_BYTES = 16 << 20
"""Of a body of JSON with a model's files, which come as long texts; over gRPC they are bytes, and may be more."""
_BASE64_PIECE = 1 << 20
"""Characters, a multiple of the four that become three bytes."""


class HttpRoutes:
    """All of Triton's HTTP routes."""

    def __init__(
        self,
        service: "Service",
        memory: SharedMemory,
        traces: TraceSettings,
        logs: LogSettings,
        max_request_bytes: int,
    ) -> None:
        self._service = service
        self._memory = memory
        self._traces = traces
        self._logs = logs
        self._infer = InferRoutes(service, memory, max_request_bytes)

    def routes(self) -> list[Route]:
        """For an application."""
        return [*self._infer.routes(), *self._server(), *self._models(), *self._repository(), *self._shared_memory()]

    def _server(self) -> list[Route]:
        return [
            Route("/v2", self.metadata),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/health", self.healthy),
            Route("/ping", self.healthy),
            Route("/version", self.version),
            Route("/v2/logging", self.logging, methods=["GET", "POST"]),
            Route("/v2/trace/setting", self.tracing, methods=["GET", "POST"]),
            Route(f"{_MODEL}/trace/setting", self.tracing, methods=["GET", "POST"]),
        ]

    def _models(self) -> list[Route]:
        actions = {"": self.model, "/ready": self.model_ready, "/config": self.config, "/stats": self.stats}
        named = [
            Route(f"{_MODEL}{version}{path}", endpoint)
            for path, endpoint in actions.items()
            for version in ("", _VERSION)
        ]
        return [Route("/v2/models/stats", self.stats), *named]

    def _repository(self) -> list[Route]:
        routes = []
        for root in ("/v2/repository", "/v2/repository/{repository}"):
            routes += [
                Route(f"{root}/index", self.index, methods=["POST"]),
                Route(f"{root}/models/{{model}}/load", self.load, methods=["POST"]),
                Route(f"{root}/models/{{model}}/unload", self.unload, methods=["POST"]),
            ]
        return routes

    def _shared_memory(self) -> list[Route]:
        routes = []
        for kind, endpoints in (
            ("system", (self.memory_status, self.memory_register, self.memory_unregister)),
            ("cuda", (self.cuda_status, self.cuda_register, self.cuda_unregister)),
        ):
            for name in ("", "/region/{region}"):
                paths = [f"/v2/{kind}sharedmemory{name}/{action}" for action in ("status", "register", "unregister")]
                routes.append(Route(paths[0], endpoints[0]))
                routes += [
                    Route(path, end, methods=["POST"]) for path, end in zip(paths[1:], endpoints[1:], strict=True)
                ]
        return routes

    async def metadata(self, request: Request) -> Response:
        """Name, version and extensions."""
        return _json(to_json(self._service.server_metadata()))

    async def live(self, request: Request) -> Response:
        """Whether the server runs."""
        return Response(status_code=200 if self._service.is_live() else 400)

    async def ready(self, request: Request) -> Response:
        """Whether all models are ready."""
        return Response(status_code=200 if self._service.is_ready() else 400)

    async def healthy(self, request: Request) -> Response:
        """Whether all models are ready, in the status codes that load balancers expect."""
        return Response(status_code=200 if self._service.is_ready() else 503)

    async def version(self, request: Request) -> Response:
        """The server's version."""
        return _json({"version": self._service.server_metadata().version})

    async def model_ready(self, request: Request) -> Response:
        """Whether one model is ready."""
        if not self._service.is_model_ready(*named_model(request)):
            raise invalid("Model version not ready")
        return Response()

    async def model(self, request: Request) -> Response:
        """A model's tensors."""
        return _json(to_json(self._service.model_metadata(*named_model(request))))

    async def config(self, request: Request) -> Response:
        """A model's configuration."""
        return _json(to_json(self._service.model_config(*named_model(request))))

    async def stats(self, request: Request) -> Response:
        """What was counted of one model, or of all."""
        model, version = named_model(request) if "model" in request.path_params else ("", "")
        return _json({"model_stats": [to_json(each) for each in self._service.statistics(model, version)]})

    async def index(self, request: Request) -> Response:
        """All models and their states."""
        only_ready = (await _object(request)).get("ready", False)
        if not isinstance(only_ready, bool):
            raise invalid("attempt to access JSON non-boolean as boolean")
        entries = map(to_json, self._service.index(ready=only_ready))
        return _json([{field: value for field, value in entry.items() if value} for entry in entries])

    async def load(self, request: Request) -> Response:
        """Load a model, or load it again."""
        parameters = await _repository_parameters(request)
        config = parameters.pop("config", None)
        if config is not None and not isinstance(config, str):
            raise invalid("attempt to access JSON non-string as string")
        sent = {key: text for key, text in parameters.items() if _is_file(key)}
        size = sum(len(text) for text in sent.values() if isinstance(text, str))
        files = await by_size(size, _decoded_files, sent)
        await self._service.load(request.path_params["model"], config, files)
        return _json_nothing()

    async def unload(self, request: Request) -> Response:
        """Unload a model."""
        with_dependents = (await _repository_parameters(request, "unload")).get("unload_dependents", False)
        if not isinstance(with_dependents, bool):
            raise invalid("attempt to access JSON non-boolean as boolean")
        await self._service.unload(request.path_params["model"], unload_dependents=with_dependents)
        return _json_nothing()

    async def memory_status(self, request: Request) -> Response:
        """The regions of shared memory."""
        fields = ("name", "key", "offset", "byte_size")
        regions = self._memory.status(request.path_params.get("region", ""))
        return _json([{field: getattr(region, field) for field in fields} for region in regions])

    async def memory_register(self, request: Request) -> Response:
        """Take a region of shared memory."""
        body = await _object(request)
        for field in ("key", "byte_size"):
            if field not in body:
                raise invalid(f"Shared memory register request has no '{field}' field")
        if not isinstance(body["key"], str):
            raise invalid("attempt to access JSON non-string as string")
        offset, size = body.get("offset", 0), body["byte_size"]
        if not all(type(number) is int and number >= 0 for number in (offset, size)):
            raise invalid("attempt to access JSON non-unsigned-integer as unsigned-integer")
        self._memory.register(request.path_params.get("region", ""), body["key"], offset, size)
        return _json_nothing()

    async def memory_unregister(self, request: Request) -> Response:
        """Forget one region, or all."""
        self._memory.unregister(request.path_params.get("region", ""))
        return _json_nothing()

    async def cuda_status(self, request: Request) -> Response:
        """There are no regions of CUDA shared memory."""
        if "region" in request.path_params:
            name = request.path_params["region"]
            raise ServiceError(ErrorKind.NOT_FOUND, f"Unable to find cuda shared memory region: '{name}'")
        return _json([])

    async def cuda_register(self, request: Request) -> Response:
        """Not supported."""
        raise ServiceError(ErrorKind.UNSUPPORTED, NO_CUDA)

    async def cuda_unregister(self, request: Request) -> Response:
        """Forgetting what is not there is no error."""
        return _json_nothing()

    async def tracing(self, request: Request) -> Response:
        """Trace settings of a model, or of all; POST changes them."""
        model = request.path_params.get("model", "")
        require_known_model(self._service, model)
        if request.method == "POST":
            self._traces.update(_trace_values(await _object(request)), model)
        settings = self._traces.get(model)
        return _json({key: value if key == "trace_level" else value[0] for key, value in settings.items()})

    async def logging(self, request: Request) -> Response:
        """Log settings; POST changes them."""
        if request.method == "POST":
            self._logs.update(await _object(request))
        return _json(self._logs.get())


def require_known_model(service: "Service", model: str) -> None:
    """INVALID where there is no such model; no name is none to look for."""
    if model and all(entry.name != model for entry in service.index()):
        raise invalid(f"Request for unknown model : {model}")


async def _object(request: Request, *, max_bytes: int = SMALL) -> dict[str, Any]:
    """The JSON object of a body of at most `max_bytes`."""
    check_declared_size(request.headers.get("content-length"), max_bytes=max_bytes)
    body = await request.body()
    return await by_size(len(body), parse_object, body, max_bytes=max_bytes)


def _json(value: object) -> Response:
    return Response(dump_json(value), media_type="application/json")


def _json_nothing() -> Response:
    return Response(media_type="application/json")


async def _repository_parameters(request: Request, action: str = "load") -> dict[str, Any]:
    if "repository" in request.path_params:
        raise ServiceError(ErrorKind.UNSUPPORTED, "'repository_name' specification is not supported")
    max_bytes = _MAX_LOAD_BYTES if action == "load" else SMALL
    parameters = (await _object(request, max_bytes=max_bytes)).get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid("attempt to get members for non-object")
    for key in parameters:
        if key not in ("config", "unload_dependents") and not _is_file(key):
            raise invalid(f"unrecognized {action} parameter '{key}'.")
    return parameters


def _is_file(key: str) -> bool:
    return key.startswith("file:")


def _decoded_files(sent: Mapping[str, Any]) -> dict[str, bytes]:
    return {key.removeprefix("file:"): _decoded(key, text) for key, text in sent.items()}


def _decoded(key: str, text: Any) -> bytes:
    """The bytes of a file, decoded in pieces between which other threads run."""
    try:
        if isinstance(text, str) and "=" not in text[:-2]:
            pieces = range(0, len(text), _BASE64_PIECE)
            return b"".join(base64.b64decode(text[at : at + _BASE64_PIECE], validate=True) for at in pieces)
    except (ValueError, binascii.Error):
        pass
    raise invalid(f"load parameter '{key}' is not base64 text")


def _trace_values(body: dict[str, Any]) -> dict[str, list[str] | None]:
    settings: dict[str, list[str] | None] = {}
    for key, value in body.items():
        values = value if key == "trace_level" else [value]
        if value is None:
            settings[key] = None
        elif not isinstance(values, list):
            raise invalid("attempt to access JSON non-array as array")
        elif not all(isinstance(text, str) for text in values):
            raise invalid("attempt to access JSON non-string as string")
        else:
            settings[key] = values
    return settings


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
