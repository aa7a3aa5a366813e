"""What every kind of model offers the service, and what it gets: a request that fits its configuration."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError
from hasten.server.types import ErrorKind, InferRequest, Parameter, ServiceError, Tensor

if TYPE_CHECKING:
    from hasten.server.engine.client import EngineClient
    from hasten.server.statistics import LanguageCounters


@dataclass
class Clock:
    """When the parts of a request's work ended, in ns of `time.monotonic_ns`."""

    begun: int = field(default_factory=time.monotonic_ns)
    prepared: int = 0
    """Its inputs were read."""
    computed: int = 0
    """There was a result to make outputs of."""
    queued: int = 0
    """ns that it waited for its turn, after it was prepared."""

    def prepare(self) -> None:
        """Its inputs are read now; the first time counts."""
        self.prepared = self.prepared or time.monotonic_ns()

    def compute(self) -> None:
        """There is a result now; the last time counts."""
        self.computed = time.monotonic_ns()

    def wait(self, seconds: float | None) -> None:
        """It waited so long; of several parts the longest counts."""
        self.queued = max(self.queued, int((seconds or 0) * 1e9))


@dataclass
class Work:
    """A request that fits the model's configuration."""

    id: str
    model: str
    inputs: Mapping[str, Tensor]
    batch_size: int
    """First axis of every input; 0 for a model without a batch axis."""
    outputs: frozenset[str]
    """Names of the outputs that are asked for."""
    parameters: Mapping[str, Parameter]
    """Those that are the model's own."""
    priority: int = 0
    queue_timeout: float | None = None
    """Seconds that it may wait; None: as long as the engine lets it."""
    clock: Clock = field(default_factory=Clock)

    def refuse_parameters(self) -> None:
        """ServiceError where there are parameters, for a model that has none."""
        for name in self.parameters:
            raise ServiceError(ErrorKind.INVALID, f"parameter '{name}' is not known to model '{self.model}'")


@dataclass
class Outcome:
    """One response to a request."""

    outputs: list[Tensor]
    final: bool
    """Whether it is the last one."""


class Model(Protocol):
    """One version of a model."""

    @property
    def ready(self) -> bool:
        """Whether requests can be computed now."""

    @property
    def engine(self) -> "EngineClient | None":
        """The engine that it owns."""

    @property
    def language(self) -> "LanguageCounters | None":
        """What its engine's requests are counted by."""

    def execute(self, work: Work) -> AsyncGenerator[Outcome, None]:
        """Compute a request. Closing the generator withdraws it. Raises HastenError."""

    async def close(self, timeout: float) -> None:
        """Wait, for so many seconds, for what other doors still compute, and end."""


class Served(Protocol):
    """A version of a model as those that depend on it see it."""

    name: str
    number: int
    config: model_config_pb2.ModelConfig

    @property
    def model(self) -> Model:
        """What computes its requests."""

    def use(self) -> AbstractContextManager[None]:
        """Keep it from ending meanwhile."""


class Models(Protocol):
    """The models beside a model that depends on others."""

    def find(self, name: str, version: int = -1) -> Served:
        """The version that serves now, -1 for the newest; ServiceError where there is none."""

    def run(self, served: Served, request: InferRequest) -> AsyncGenerator[Outcome, None]:
        """Compute a request with it, checked and counted as if it had come from outside."""


def required_engine(served: Served) -> "EngineClient":
    """The engine of a token model; ConfigError where a model has none."""
    if served.model.engine is None:
        raise ConfigError(f"model '{served.name}' has no engine: parameter 'token_model' must name one that has")
    return served.model.engine
