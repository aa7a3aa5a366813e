"""What every kind of model offers the service."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError
from hasten.server.models.work import Outcome, Stream, Work
from hasten.server.types import InferRequest, InferResponse

if TYPE_CHECKING:
    from hasten.server.engine.client import EngineClient


class Model(Protocol):
    """One version of a model."""

    @property
    def ready(self) -> bool:
        """Whether requests can be computed now."""

    @property
    def engine(self) -> "EngineClient | None":
        """The engine that it owns."""

    def execute(self, work: Work) -> Stream[Outcome]:
        """Compute a request."""

    async def close(self, timeout: float) -> None:
        """Drain requests of other frontends for up to `timeout` seconds, then close."""


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

    def run(self, served: Served, request: InferRequest) -> Stream[Outcome | InferResponse]:
        """Compute a request with it, checked and counted as if it had come from outside."""


def required_engine(served: Served) -> "EngineClient":
    """The engine of a token model; ConfigError where a model has none."""
    if served.model.engine is None:
        raise ConfigError(f"model '{served.name}' has no engine: parameter 'token_model' must name one that has")
    return served.model.engine
