"""Triton's gRPC service, `inference.GRPCInferenceService`: nineteen calls that answer once. They translate; what is
asked is done by the operations and the service. The twentieth, ModelStreamInfer, is in `grpc_stream`.
"""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from hasten.server.access import AccessLog
from hasten.server.by_size import by_size
from hasten.server.call import set_tenant
from hasten.server.errors import client_error, retry_after
from hasten.server.inflight import Claim, InflightBytes
from hasten.server.models.config import is_decoupled
from hasten.server.options import SecurityOptions
from hasten.server.protocol.grpc_stream import InferStream, ReceivedInfer
from hasten.server.protocol.operations import Handler, LoadRequest, Operations
from hasten.server.protocol.proto import infer_request, infer_response, parsed, parsed_infer
from hasten.server.protocol.shared_memory import delivery
from hasten.server.protocol.tensors import byte_size
from hasten.server.security import NO_KEY, OPEN_CALLS, ApiKeys
from hasten.server.types import ErrorKind, ServiceError, invalid

SERVICE = "inference.GRPCInferenceService"
_HEALTH = "grpc.health.v1.Health"
_DECOUPLED = "ModelInfer RPC doesn't support models with decoupled transaction policy"
_PUSHBACK = "grpc-retry-pushback-ms"
"""Of trailing metadata: when gRPC's own retries try again."""
_ERROR_BY_STATUS = ("triton_grpc_error", "true")
"""Of a stream's metadata: a model's first error is to end it, as its status."""
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""HealthCheckResponse, serialized."""

Reader = Callable[[bytes, Claim], Any]
"""Makes of a message's bytes what a handler gets, and holds what else that takes."""


class GrpcCalls:
    """What each unary call does, and what reads its request."""

    def __init__(
        self,
        operations: Operations,
        inflight: InflightBytes | None = None,
        *,
        max_stream_bytes: int = SecurityOptions.max_request_bytes,
    ) -> None:
        self.service = operations.service
        self._memory = operations.memory
        self.inflight = inflight or InflightBytes()
        self.max_stream_bytes = max_stream_bytes
        self._logs = operations.logs
        self.handlers = operations.handlers | {"ModelInfer": self._infer, "LogSettings": self._log_settings}
        self.readers: dict[str, Reader] = {
            name: partial(_message, getattr(pb, f"{name}Request")) for name in self.handlers
        }
        self.readers |= {"ModelInfer": self._read_infer, "RepositoryModelLoad": _read_load}

    def received(self, message: Any, tensors: Sequence[bytes | memoryview], claim: Claim) -> ReceivedInfer:
        """The request of a ModelInferRequest and its raw tensors; ServiceError where that is wrong."""
        config = self.service.model_config(message.model_name, message.model_version)
        request = infer_request(message, tensors, self._memory.reader(claim))
        deliver = delivery(request.outputs, self._memory, batched=config.max_batch_size > 0)
        return ReceivedInfer(request, is_decoupled(config), deliver)

    def _read_infer(self, raw: bytes, claim: Claim) -> ReceivedInfer:
        """A request for one response; may take long, and be done in a thread."""
        received = self.received(*parsed_infer(raw), claim)
        if received.decoupled:
            raise ServiceError(ErrorKind.UNSUPPORTED, _DECOUPLED)
        return received

    async def _infer(self, received: ReceivedInfer) -> bytes:
        """One request, one response, serialized."""
        response = await self.service.infer(received.request)
        return await by_size(byte_size(response.outputs), lambda: infer_response(response, received.deliver(response)))

    def _log_settings(self, request: Any) -> Any:
        """Log settings, after those in the request are changed."""
        changes = {}
        for key, setting in request.settings.items():
            kind = setting.WhichOneof("parameter_choice")
            changes[key] = None if kind is None else getattr(setting, kind)
        self._logs.update(changes)
        kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        settings = {key: {kinds[type(value)]: value} for key, value in self._logs.get().items()}
        return pb.LogSettingsResponse(settings=settings)


def _message(kind: Any, raw: bytes, _: Claim) -> Any:
    return parsed(kind, raw)


def _read_load(raw: bytes, _: Claim) -> LoadRequest:
    """A request to load a model; may take long, and be done in a thread."""
    request = parsed(pb.RepositoryModelLoadRequest, raw)
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, parameter in request.parameters.items():
        if key == "config":
            config = _typed(key, parameter, "string_param")
        elif key.startswith("file:"):
            files[key.removeprefix("file:")] = _typed(key, parameter, "bytes_param")
        else:
            raise invalid(f"unrecognized load parameter '{key}'.")
    return LoadRequest(request.model_name, config, files, request.repository_name)


def _typed(key: str, parameter: Any, kind: str) -> Any:
    if parameter.WhichOneof("parameter_choice") != kind:
        raise invalid(f"invalid value type for load parameter '{key}', expected {kind}.")
    return getattr(parameter, kind)


def add_to_server(server: Any, calls: GrpcCalls, keys: ApiKeys | None, access: AccessLog) -> None:
    """Have a `grpc.aio.Server` serve these calls, and `grpc.health.v1.Health/Check` for a cluster's probes."""
    handlers = {}
    for name, handler in calls.handlers.items():
        serializer = None if name == "ModelInfer" else getattr(pb, f"{name}Response").SerializeToString
        answer = _answering(handler, calls.readers[name], calls.inflight, None if name in OPEN_CALLS else keys)
        recorded = access.grpc(f"/{SERVICE}/{name}", answer)
        handlers[name] = grpc.unary_unary_rpc_method_handler(recorded, response_serializer=serializer)

    async def stream(requests: Any, context: Any) -> None:
        await _admit(context, keys)
        by_status = any(pair == _ERROR_BY_STATUS for pair in context.invocation_metadata() or ())
        error = await InferStream(calls, context, ends_with_error=by_status).serve(requests)
        if error is not None:
            await context.abort(grpc.StatusCode[error.kind.value.grpc], str(error))

    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        access.grpc(f"/{SERVICE}/ModelStreamInfer", stream)
    )

    async def check(_request: bytes, _context: Any) -> bytes:
        return _SERVING if calls.service.is_ready() else _NOT_SERVING

    health = {"Check": grpc.unary_unary_rpc_method_handler(access.grpc(f"/{_HEALTH}/Check", check))}
    for name, methods in ((SERVICE, handlers), (_HEALTH, health)):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


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
        if known.kind.is_temporary:
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
