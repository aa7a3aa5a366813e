"""Triton's operations that ask or tell the server something: a message of the protocol in, another one out.

gRPC sends these messages as they are, HTTP has them as JSON. Names are those of gRPC's calls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2 as pb

from hasten.server.protocol.settings import LogSettings, TraceSettings
from hasten.server.protocol.shared_memory import NO_CUDA, SharedMemory
from hasten.server.types import ErrorKind, ServiceError, invalid

if TYPE_CHECKING:
    from hasten.server.service import Service

Handler = Callable[[Any], Any]
"""From a request to its response, or an awaitable of it."""


@dataclass(frozen=True)
class LoadRequest:
    """A model to load, with another configuration or other files where they are given."""

    model: str
    config: str | None
    files: dict[str, bytes]
    repository: str = ""


class Operations:
    """What each of them does."""

    def __init__(self, service: "Service", memory: SharedMemory, traces: TraceSettings, logs: LogSettings) -> None:
        self.service = service
        self.memory = memory
        self.logs = logs
        self._traces = traces
        self.handlers: dict[str, Handler] = {
            "ServerLive": lambda _: pb.ServerLiveResponse(live=True),
            "ServerReady": lambda _: pb.ServerReadyResponse(ready=service.is_ready()),
            "ModelReady": lambda model: pb.ModelReadyResponse(ready=service.is_model_ready(model.name, model.version)),
            "ServerMetadata": lambda _: service.server_metadata(),
            "ModelMetadata": lambda model: service.model_metadata(model.name, model.version),
            "ModelConfig": lambda model: pb.ModelConfigResponse(config=service.model_config(model.name, model.version)),
            "ModelStatistics": lambda model: pb.ModelStatisticsResponse(
                model_stats=service.statistics(model.name, model.version)
            ),
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": self._memory_status,
            "SystemSharedMemoryRegister": self._memory_register,
            "SystemSharedMemoryUnregister": self._memory_unregister,
            "CudaSharedMemoryStatus": self._cuda_status,
            "CudaSharedMemoryRegister": self._cuda_register,
            "CudaSharedMemoryUnregister": lambda _: pb.CudaSharedMemoryUnregisterResponse(),
            "TraceSetting": self._trace_setting,
        }

    def _index(self, request: Any) -> Any:
        _refuse_repository(request.repository_name)
        return pb.RepositoryIndexResponse(models=self.service.index(ready=request.ready))

    async def _load(self, request: LoadRequest) -> Any:
        _refuse_repository(request.repository)
        await self.service.load(request.model, request.config, request.files)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any) -> Any:
        _refuse_repository(request.repository_name)
        for key, parameter in request.parameters.items():
            if key != "unload_dependents":
                raise invalid(f"unrecognized unload parameter '{key}'.")
            if parameter.WhichOneof("parameter_choice") != "bool_param":
                raise invalid(f"invalid value type for '{key}' parameter, expected bool_param.")
        with_dependents = request.parameters["unload_dependents"].bool_param
        await self.service.unload(request.model_name, unload_dependents=with_dependents)
        return pb.RepositoryModelUnloadResponse()

    def _memory_status(self, request: Any) -> Any:
        fields = ("name", "key", "offset", "byte_size")
        regions = {
            each.name: {field: getattr(each, field) for field in fields} for each in self.memory.status(request.name)
        }
        return pb.SystemSharedMemoryStatusResponse(regions=regions)

    def _memory_register(self, request: Any) -> Any:
        self.memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def _memory_unregister(self, request: Any) -> Any:
        self.memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def _cuda_status(self, request: Any) -> Any:
        if request.name:
            raise ServiceError(ErrorKind.NOT_FOUND, f"Unable to find cuda shared memory region: '{request.name}'")
        return pb.CudaSharedMemoryStatusResponse()

    def _cuda_register(self, _: Any) -> Any:
        raise ServiceError(ErrorKind.UNSUPPORTED, NO_CUDA)

    def _trace_setting(self, request: Any) -> Any:
        """Settings of a model, or of all, after those in the request are changed."""
        model = request.model_name
        if model and all(entry.name != model for entry in self.service.index()):
            raise invalid(f"Request for unknown model : {model}")
        self._traces.update({key: list(setting.value) for key, setting in request.settings.items()}, model)
        settings = self._traces.get(model)
        return pb.TraceSettingResponse(settings={key: {"value": values} for key, values in settings.items()})


def _refuse_repository(name: str) -> None:
    """ServiceError where an operation is to be done in a repository of its own name."""
    if name:
        raise ServiceError(ErrorKind.UNSUPPORTED, "'repository_name' specification is not supported")
