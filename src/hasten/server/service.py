"""The one data plane behind all transports: requests in, responses out, and the models that compute them.

What it says of itself and of models are messages of Triton's protocol, which HTTP has as JSON.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from enum import StrEnum

from tritonclient.grpc import model_config_pb2, service_pb2

from hasten import __version__
from hasten.server.call import note_model
from hasten.server.engine.client import NO_LIMITS, EngineClient
from hasten.server.engine.queue import QueueLimits
from hasten.server.lifecycle import Registry, StartEngine
from hasten.server.models.config import is_decoupled
from hasten.server.models.interfaces import TEXT_KINDS
from hasten.server.models.parameters import token_model_of
from hasten.server.repository import Repository
from hasten.server.statistics import Counters, Tally
from hasten.server.types import ErrorKind, InferRequest, InferResponse, ServiceError, invalid
from hasten.server.version import LoadFailure, State, Version, version_number

EXTENSIONS = (
    *("classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy"),
    *("model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters"),
    *("statistics", "trace", "logging"),
)
_NO_CONTROL = "explicit model load / unload is not allowed if polling is enabled"
_STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"
_log = logging.getLogger(__name__)


def _entry(
    name: str, version: str = "", state: str = "", reason: str = ""
) -> service_pb2.RepositoryIndexResponse.ModelIndex:
    """A row of the index; a folder's name need not be UTF-8, as texts of the protocol are."""
    name, reason = (text.encode(errors="replace").decode() for text in (name, reason))
    return service_pb2.RepositoryIndexResponse.ModelIndex(name=name, version=version, state=str(state), reason=reason)


class ControlMode(StrEnum):
    """Who decides which models are loaded."""

    NONE = "none"
    """All are, when the server starts."""
    POLL = "poll"
    """All are, and changes in the repository are followed."""
    EXPLICIT = "explicit"
    """Those named when the server starts, and then whatever clients load and unload."""


class Service:
    """The models of a repository, ready to be asked. All methods belong to one event loop."""

    def __init__(
        self,
        repository: Repository,
        *,
        mode: ControlMode = ControlMode.NONE,
        server_id: str = "hasten",
        strict_readiness: bool = True,
        start_engine: StartEngine = EngineClient.start,
        limits: QueueLimits = NO_LIMITS,
    ) -> None:
        """`limits`: those of all queues, beside what models say of their own."""
        self.counters = Counters()
        self.mode = mode
        self._server_id = server_id
        self._strict = strict_readiness
        self._registry = Registry(repository, self.counters, start_engine, limits)
        self._started = self._closing = False
        self._polling: asyncio.Task[None] | None = None

    async def start(self, load_models: Iterable[str] = (), *, repository_poll_secs: float = 15.0) -> None:
        """Load what the mode says: all models, or `load_models`, where `*` means all. Failures are in `failures`."""
        names = list(load_models)
        if self.mode is not ControlMode.EXPLICIT or "*" in names:
            names = await asyncio.to_thread(self._registry.repository.names)
        if self.mode is ControlMode.POLL:
            await self._registry.poll()
            self._polling = asyncio.get_running_loop().create_task(self._poll_forever(repository_poll_secs))
        else:
            await self._registry.load_all(names)
        self._started = True

    async def _poll_forever(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self._registry.poll()
            except OSError as error:
                _log.error("the model repository cannot be read: %s", error)

    @property
    def failures(self) -> Mapping[str, LoadFailure]:
        """Models that could not be loaded when that was last tried, and why."""
        return dict(self._registry.failures)

    async def infer(self, request: InferRequest) -> InferResponse:
        """The one response to a request; ServiceError where it fails, or where there is more than one."""
        first: InferResponse | None = None
        async with aclosing(self.stream(request)) as responses:
            async for response in responses:
                if first is not None:
                    raise invalid(f"model '{request.model}' gives several responses to this request; use a stream")
                first = response
        assert first is not None, "a model gives one response at least"
        return first

    def stream(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """The responses to a request; ServiceError where no such model serves."""
        note_model(request.model)
        return self._find(request.model, request.version).run(request)

    def check_open(self) -> None:
        """ServiceError once the server is to end and takes no more requests."""
        if self._closing:
            raise ServiceError(ErrorKind.UNAVAILABLE, _STOPPING)

    def _find(self, model: str, version: str) -> Version:
        self.check_open()
        return self._registry.find(model, version_number(version))

    def is_decoupled(self, model: str, version: str = "") -> bool:
        """Whether a request may have several responses; ServiceError where there is no such model."""
        return is_decoupled(self._find(model, version).config)

    def server_metadata(self) -> service_pb2.ServerMetadataResponse:
        """Name, version and extensions."""
        return service_pb2.ServerMetadataResponse(name=self._server_id, version=__version__, extensions=EXTENSIONS)

    def model_metadata(self, model: str, version: str = "") -> service_pb2.ModelMetadataResponse:
        """A model's tensors; without a version, those of the newest and the numbers of all that serve."""
        message = service_pb2.ModelMetadataResponse()
        message.CopyFrom(self._find(model, version).metadata)
        serving = (str(each.number) for each in self._registry.serving() if each.name == model)
        message.versions.extend([version] if version else serving)
        return message

    def model_config(self, model: str, version: str = "") -> model_config_pb2.ModelConfig:
        """A model's configuration, complete; not to be changed."""
        return self._find(model, version).config

    def statistics(self, model: str = "", version: str = "") -> list[service_pb2.ModelStatistics]:
        """Of all models that serve, or of one; a version is looked at only with a model."""
        number = version_number(version)
        serving = [each for each in self._registry.serving() if model in ("", each.name)]
        found = [each for each in serving if not model or number in (-1, each.number)]
        if model and not serving:
            raise invalid(f"requested model '{model}' is not available")
        if model and not found:
            raise invalid(f"requested model version is not available for model '{model}'")
        return [self.counters[each.name, str(each.number)].message() for each in found]

    def index(self, *, ready: bool = False) -> list[service_pb2.RepositoryIndexResponse.ModelIndex]:
        """What the repository holds, and the state of what was loaded; `ready`: only what serves.

        What was never loaded has neither version nor state.
        """
        versions = list(self._registry.versions())
        entries = [_entry(each.name, str(each.number), *self._state(each)) for each in versions]
        if ready:
            return [entry for entry in entries if entry.state == State.READY]
        known = {each.name for each in versions}
        others = set(self._registry.repository.names()) | set(self._registry.failures)
        for name in others - known:
            failure = self._registry.failures.get(name)
            entries.append(_entry(name) if failure is None else _entry(name, "", State.UNAVAILABLE, failure.reason))
        return sorted(entries, key=lambda entry: (entry.name, int(entry.version or 0)))

    def _state(self, version: Version) -> tuple[str, str]:
        if version.state is not State.READY:
            return version.state, version.reason
        lacks = self._registry.lacks(version)
        if lacks is not None:
            return State.UNAVAILABLE, f"it needs model '{lacks}', which is not ready"
        if not version.model.ready:
            return State.UNAVAILABLE, "its engine is starting again"
        replicas = () if version.model.engine is None else version.model.engine.replicas
        absent = [str(index) for index, replica in enumerate(replicas) if not replica.ready]
        text = f"{len(absent)} of {len(replicas)} replicas not ready: {', '.join(absent)}"
        return State.READY, text if absent else ""

    async def load(self, model: str, config_json: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Load a model or load it again, with another configuration and files if given; ServiceError if that fails."""
        self._check_control()
        await self._registry.load(model, config_json, files)

    async def unload(self, model: str, *, unload_dependents: bool = False) -> None:
        """Unload a model; requests under way finish. `unload_dependents`: also what was loaded for it alone."""
        self._check_control()
        await self._registry.unload(model, unload_dependents=unload_dependents)

    def _check_control(self) -> None:
        self.check_open()
        if self.mode is not ControlMode.EXPLICIT:
            raise ServiceError(ErrorKind.UNAVAILABLE, _NO_CONTROL)

    def is_ready(self) -> bool:
        """Whether it takes requests; with strict readiness, also whether all models that should serve are ready."""
        if not self._started or self._closing:
            return False
        if not self._strict:
            return True
        registry = self._registry
        wanted = [each for each in registry.versions() if each.failed or each.state in (State.READY, State.LOADING)]
        return all(map(registry.any_serves, registry.failures)) and all(map(registry.is_ready, wanted))

    def is_model_ready(self, model: str, version: str = "") -> bool:
        """Whether a model takes requests; False for one that there is not, ServiceError for what is no version."""
        try:
            return not self._closing and self._registry.is_ready(self._find(model, version))
        except ServiceError as error:
            if error.kind is ErrorKind.INVALID:
                raise
            return False

    @property
    def changes(self) -> int:
        """How often it has changed which models serve."""
        return self._registry.changes

    def engines(self) -> Mapping[tuple[str, str], EngineClient]:
        """The engines of the models that serve, by model and version."""
        pairs = ((each, each.model.engine) for each in self._registry.serving())
        return {(each.name, str(each.number)): engine for each, engine in pairs if engine is not None}

    def tally(self, model: str, version: str, items: int, begun: int, *, stream: bool = False) -> Tally:
        """What counts a request for an engine of `engines` that an API makes of it; ServiceError where none serves."""
        return self._find(model, version).tally(items, begun, stream=stream)

    def backends(self) -> Mapping[str, list[str]]:
        """The models that serve, by the backend that computes them."""
        backends: dict[str, list[str]] = {}
        for each in self._registry.serving():
            models = backends.setdefault(each.config.backend, [])
            models += [each.name] if each.name not in models else []
        backends.pop("", None)  # ensembles have none
        return backends

    def text_models(self) -> Mapping[str, str]:
        """The text models that serve, each with the token model whose engine it uses."""
        texts = (each for each in self._registry.serving() if each.description.kind in TEXT_KINDS)
        return {each.name: token_model_of(each.config) for each in texts}

    async def close(self, exit_timeout: float) -> None:
        """Take no more requests, let those in flight finish for up to `exit_timeout` seconds, and end the engines."""
        self._closing = True
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait((self._polling,))
        await self._registry.close(exit_timeout)
