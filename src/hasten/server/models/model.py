"""What every kind of model offers the service."""

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError
from hasten.server.models.parameters import token_model_of
from hasten.server.models.work import Outcome, Work
from hasten.server.types import InferRequest, InferResponse

if TYPE_CHECKING:
    from hasten.engine.text import Tokenizer
    from hasten.server.engine.client import EngineClient


class Model(Protocol):
    """One version of a model."""

    @property
    def ready(self) -> bool:
        """Whether requests can be computed now."""

    @property
    def engine(self) -> "EngineClient | None":
        """The engine that it owns."""

    def execute(self, work: Work) -> AsyncGenerator[Outcome, None]:
        """Compute a request, from when the first response is awaited; closed, it is withdrawn.

        Raises the HastenError that ended it.
        """

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

    def run(self, served: Served, request: InferRequest) -> AsyncGenerator[Outcome | InferResponse, None]:
        """Compute a request with it, checked and counted as if it had come from outside."""


class EngineModel:
    """A version of a model with an engine of its own, which ends with it."""

    def __init__(self, engine: "EngineClient") -> None:
        self.engine = engine

    @property
    def ready(self) -> bool:
        """Whether the engine's process lives and has loaded the model."""
        return self.engine.ready

    async def close(self, timeout: float) -> None:
        """Wait, for `timeout` seconds at most, for what other models still compute with the engine, and end it."""
        await self.engine.drain(timeout)
        await self.engine.close()


class DependentModel:
    """A version of a model that uses the engine of a token model: for each request that of the version that serves."""

    engine: "EngineClient | None" = None

    def __init__(self, config: model_config_pb2.ModelConfig, models: Models) -> None:
        self.token_model = token_model_of(config)
        self._models = models

    @property
    def ready(self) -> bool:
        """Whether the token model is."""
        return self.find().model.ready

    def find(self) -> Served:
        """The token model that serves now; ServiceError where there is none."""
        return self._models.find(self.token_model)

    def token_engine(self, served: Served | None = None) -> "EngineClient":
        """The engine of the token model, by default of the version that serves now; ConfigError where it has none."""
        engine = (served or self.find()).model.engine
        if engine is None:
            raise ConfigError(
                f"model '{self.token_model}' has no engine: parameter 'token_model' must name one that has"
            )
        return engine

    def token_model_tokenizer(self) -> "Tokenizer":
        """The tokenizer of the token model; ConfigError where it has none."""
        tokenizer = self.token_engine().tokenizer
        if tokenizer is None:
            raise ConfigError(f"model '{self.token_model}' has no tokenizer; set its parameter 'tokenizer_path'")
        return tokenizer

    async def close(self, timeout: float) -> None:
        """It holds nothing."""
