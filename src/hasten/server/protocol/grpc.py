"""Triton's gRPC service, `inference.GRPCInferenceService`: nineteen calls that answer once. They translate; what is
asked is done by the service. The twentieth, ModelStreamInfer, is in `grpc_stream`.
"""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from hasten.server.by_size import by_size
from hasten.server.cache_salt import set_tenant
from hasten.server.errors import client_error
from hasten.server.http_errors import retry_after
from hasten.server.inflight import Claim, InflightBytes
from hasten.server.options import SecurityOptions
from hasten.server.protocol.grpc_stream import ReceivedInfer, received_infer, stream_infer
from hasten.server.protocol.http import require_known_model
from hasten.server.protocol.proto import infer_response, parsed, parsed_infer
from hasten.server.protocol.settings import LogSettings, TraceSettings
from hasten.server.protocol.shared_memory import NO_CUDA, SharedMemory
from hasten.server.protocol.tensors import byte_size
from hasten.server.security import NO_KEY, OPEN_CALLS, ApiKeys
from hasten.server.types import ErrorKind, InferResponse, ServiceError, invalid

if TYPE_CHECKING:
    from hasten.server.service import Service

SERVICE = "inference.GRPCInferenceService"
_DECOUPLED = "ModelInfer RPC doesn't support models with decoupled transaction policy"
_PUSHBACK = "grpc-retry-pushback-ms"
"""Of trailing metadata: when gRPC's own retries try again."""
_ERROR_BY_STATUS = ("triton_grpc_error", "true")
"""Of a stream's metadata: a model's first error is to end it, as its status."""
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""HealthCheckResponse, serialized."""

Handler = Callable[[Any], Any]
Reader = Callable[[bytes, Claim], Any]
"""Makes of a message's bytes what a handler gets, and holds what else that takes."""


@dataclass(frozen=True)
class LoadRequest:
    """A model to load, with another configuration or other files where they are given."""

    model: str
    config: str | None
    files: dict[str, bytes]


class GrpcCalls:
    """What each unary call does: a method gets the request and returns the response, or an awaitable of it."""

    def __init__(
        self,
        service: "Service",
        memory: SharedMemory,
        traces: TraceSettings,
        logs: LogSettings,
        inflight: InflightBytes | None = None,
        *,
        max_stream_bytes: int = SecurityOptions.max_request_bytes,
    ) -> None:
        self.service = service
        self.memory = memory
        self.inflight = inflight or InflightBytes()
        self.max_stream_bytes = max_stream_bytes
        self._traces = traces
        self._logs = logs

    def handlers(self) -> dict[str, Handler]:
        """By the call's name."""
        return {
            "ServerLive": lambda _: pb.ServerLiveResponse(live=self.service.is_live()),
            "ServerReady": lambda _: pb.ServerReadyResponse(ready=self.service.is_ready()),
            "ModelReady": self.model_ready,
            "ServerMetadata": lambda _: self.service.server_metadata(),
            "ModelMetadata": lambda request: self.service.model_metadata(request.name, request.version),
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "ModelInfer": self.model_infer,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.repository_model_load,
            "RepositoryModelUnload": self.repository_model_unload,
            "SystemSharedMemoryStatus": self.system_shared_memory_status,
            "SystemSharedMemoryRegister": self.system_shared_memory_register,
            "SystemSharedMemoryUnregister": self.system_shared_memory_unregister,
            "CudaSharedMemoryStatus": self.cuda_shared_memory_status,
            "CudaSharedMemoryRegister": self.cuda_shared_memory_register,
            "CudaSharedMemoryUnregister": lambda _: pb.CudaSharedMemoryUnregisterResponse(),
            "TraceSetting": self.trace_setting,
            "LogSettings": self.log_settings,
        }

    def readers(self) -> dict[str, Reader]:
        """What reads the messages of calls that may be large, by the call's name."""
        return {"ModelInfer": self.read_infer, "RepositoryModelLoad": self.read_load}

    def model_ready(self, request: Any) -> Any:
        """Whether one model is ready."""
        return pb.ModelReadyResponse(ready=self.service.is_model_ready(request.name, request.version))

    def model_config(self, request: Any) -> Any:
        """A model's configuration."""
        return pb.ModelConfigResponse(config=self.service.model_config(request.name, request.version))

    def model_statistics(self, request: Any) -> Any:
        """What was counted of one model, or of all."""
        return pb.ModelStatisticsResponse(model_stats=self.service.statistics(request.name, request.version))

    def read_infer(self, raw: bytes, claim: Claim) -> ReceivedInfer:
        """A request for one response; may take long, and be done in a thread."""
        message, tensors = parsed_infer(raw)
        if self.service.is_decoupled(message.model_name, message.model_version):
            raise ServiceError(ErrorKind.UNSUPPORTED, _DECOUPLED)
        return received_infer(message, tensors, self.service, self.memory, claim)

    async def model_infer(self, received: ReceivedInfer) -> bytes:
        """One request, one response, serialized."""
        response = await self.service.infer(received.request)
        return await by_size(byte_size(response.outputs), _serialized, response, received)

    def repository_index(self, request: Any) -> Any:
        """All models and their states."""
        _refuse_repository(request)
        return pb.RepositoryIndexResponse(models=self.service.index(ready=request.ready))

    def read_load(self, raw: bytes, _: Claim) -> LoadRequest:
        """A request to load a model; may take long, and be done in a thread."""
        request = parsed(pb.RepositoryModelLoadRequest, raw)
        _refuse_repository(request)
        config: str | None = None
        files: dict[str, bytes] = {}
        for key, parameter in request.parameters.items():
            if key == "config":
                config = _typed(key, parameter, "string_param")
            elif key.startswith("file:"):
                files[key.removeprefix("file:")] = _typed(key, parameter, "bytes_param")
            else:
                raise invalid(f"unrecognized load parameter '{key}'.")
        return LoadRequest(request.model_name, config, files)

    async def repository_model_load(self, request: LoadRequest) -> Any:
        """Load a model, or load it again."""
        await self.service.load(request.model, request.config, request.files)
        return pb.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: Any) -> Any:
        """Unload a model."""
        _refuse_repository(request)
        dependents = False
        for key, parameter in request.parameters.items():
            if key != "unload_dependents":
                raise invalid(f"unrecognized unload parameter '{key}'.")
            if parameter.WhichOneof("parameter_choice") != "bool_param":
                raise invalid(f"invalid value type for '{key}' parameter, expected bool_param.")
            dependents = parameter.bool_param
        await self.service.unload(request.model_name, unload_dependents=dependents)
        return pb.RepositoryModelUnloadResponse()

    def system_shared_memory_status(self, request: Any) -> Any:
        """The regions of shared memory."""
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self.memory.status(request.name):
            status = response.regions[region.name]
            status.name, status.key, status.offset = region.name, region.key, region.offset
            status.byte_size = region.byte_size
        return response

    def system_shared_memory_register(self, request: Any) -> Any:
        """Take a region of shared memory."""
        self.memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def system_shared_memory_unregister(self, request: Any) -> Any:
        """Forget one region, or all."""
        self.memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_shared_memory_status(self, request: Any) -> Any:
        """There are no regions of CUDA shared memory."""
        if request.name:
            raise ServiceError(ErrorKind.NOT_FOUND, f"Unable to find cuda shared memory region: '{request.name}'")
        return pb.CudaSharedMemoryStatusResponse()

    def cuda_shared_memory_register(self, request: Any) -> Any:
        """Not supported."""
        raise ServiceError(ErrorKind.UNSUPPORTED, NO_CUDA)

    def trace_setting(self, request: Any) -> Any:
        """Trace settings of a model, or of all, after those in the request are changed."""
        require_known_model(self.service, request.model_name)
        changes = {key: list(setting.value) for key, setting in request.settings.items()}
        self._traces.update(changes, request.model_name)
        response = pb.TraceSettingResponse()
        for key, values in self._traces.get(request.model_name).items():
            response.settings[key].value.extend(values)
        return response

    def log_settings(self, request: Any) -> Any:
        """Log settings, after those in the request are changed."""
        changes = {}
        for key, setting in request.settings.items():
            kind = setting.WhichOneof("parameter_choice")
            changes[key] = None if kind is None else getattr(setting, kind)
        self._logs.update(changes)
        response = pb.LogSettingsResponse()
        for key, value in self._logs.get().items():
            kind = {bool: "bool_param", int: "uint32_param"}.get(type(value), "string_param")
            setattr(response.settings[key], kind, value)
        return response


def _serialized(response: InferResponse, received: ReceivedInfer) -> bytes:
    return infer_response(response, received.deliver(response))


def _refuse_repository(request: Any) -> None:
    if request.repository_name:
        raise ServiceError(ErrorKind.UNSUPPORTED, "'repository_name' specification is not supported")


def _typed(key: str, parameter: Any, kind: str) -> Any:
    if parameter.WhichOneof("parameter_choice") != kind:
        raise invalid(f"invalid value type for load parameter '{key}', expected {kind}.")
    return getattr(parameter, kind)


def add_to_server(server: Any, calls: GrpcCalls, keys: ApiKeys | None) -> None:
    """Have a `grpc.aio.Server` serve these calls, and `grpc.health.v1.Health/Check` for a cluster's probes."""
    handlers = {}
    for name, handler in calls.handlers().items():
        read = calls.readers().get(name, _reader(getattr(pb, f"{name}Request")))
        serializer = None if name == "ModelInfer" else getattr(pb, f"{name}Response").SerializeToString
        handlers[name] = grpc.unary_unary_rpc_method_handler(
            _answering(handler, read, calls.inflight, None if name in OPEN_CALLS else keys),
            response_serializer=serializer,
        )

    async def stream(requests: Any, context: Any) -> None:
        await _admit(context, keys)
        by_status = any(pair == _ERROR_BY_STATUS for pair in context.invocation_metadata() or ())
        options: dict[str, Any] = {"max_bytes": calls.max_stream_bytes, "ends_with_error": by_status}
        error = await stream_infer(calls.service, calls.memory, requests, context, calls.inflight, **options)
        if error is not None:
            await context.abort(grpc.StatusCode[error.kind.value.grpc], str(error))

    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(stream)

    async def check(_request: bytes, _context: Any) -> bytes:
        return _SERVING if calls.service.is_ready() else _NOT_SERVING

    health = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    for name, methods in ((SERVICE, handlers), ("grpc.health.v1.Health", health)):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


def _reader(kind: Any) -> Reader:
    return lambda raw, _: parsed(kind, raw)


def _answering(
    handler: Handler, read: Reader, inflight: InflightBytes, keys: ApiKeys | None
) -> Callable[[bytes, Any], Awaitable[Any]]:
    """A handler of requests that are to be read, with keys checked and errors turned into statuses."""
    waits = inspect.iscoroutinefunction(handler)

    async def answer(raw: bytes, context: Any) -> Any:
        await _admit(context, keys)
        try:
            with inflight.claim() as claim:
                claim.grow(len(raw))
                response = handler(await by_size(len(raw), read, raw, claim))
                return await response if waits else response
        except Exception as error:
            known = client_error(error, "a gRPC call")
        if known.is_temporary:
            _set_retry_after(context, retry_after(known.retry_after))
        await context.abort(grpc.StatusCode[known.kind.value.grpc], str(known))

    return answer


def _set_retry_after(context: Any, seconds: int) -> None:
    """Put it into the trailing metadata, where a client's retry policy finds it."""
    known = context.trailing_metadata() or ()
    context.set_trailing_metadata((*known, (_PUSHBACK, str(1000 * seconds)), ("retry-after", str(seconds))))


async def _admit(context: Any, keys: ApiKeys | None) -> None:
    """End a call without a key; else what it asks of engines belongs to its key's tenant."""
    set_tenant("")
    if keys is None:
        return
    metadata = dict(context.invocation_metadata() or ())
    texts = [metadata.get(name, "") for name in ("authorization", "x-api-key")]
    tenant = keys.tenant(*(text if isinstance(text, str) else text.decode("latin-1") for text in texts))
    if tenant is None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, NO_KEY)
    set_tenant(tenant or "")
