"""What every kind of model offers the service."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError
from hasten.server.models.parameters import token_model_of
from hasten.server.models.work import Work
from hasten.server.types import InferResponse

if TYPE_CHECKING:
    from hasten.engine.text import Tokenizer
    from hasten.server.engine.client import EngineClient
    from hasten.server.lifecycle import Registry
    from hasten.server.version import Version


class Model(ABC):
    """One version of a model."""

    engine: "EngineClient | None" = None
    """The engine that it owns."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether requests can be computed now."""

    @abstractmethod
    def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """Compute a request, from when the first response is awaited; closed, it is withdrawn.

        Raises the HastenError that ended it.
        """

    async def close(self, timeout: float) -> None:
        """Wait, for `timeout` seconds at most, for what other models still compute with its engine, and end that."""
        if self.engine is not None:
            await self.engine.drain(timeout)
            await self.engine.close()


class EngineModel(Model):
    """A version of a model with an engine of its own, which ends with it."""

    engine: "EngineClient"

    def __init__(self, engine: "EngineClient") -> None:
        self.engine = engine

    @property
    def ready(self) -> bool:
        """Whether the engine's process lives and has loaded the model."""
        return self.engine.ready


class DependentModel(Model):
    """A version of a model that uses the engine of a token model: for each request that of the version that serves."""

    def __init__(self, config: model_config_pb2.ModelConfig, models: "Registry") -> None:
        self.token_model = token_model_of(config)
        self._models = models

    @property
    def ready(self) -> bool:
        """Whether the token model is."""
        return self.find().model.ready

    def find(self) -> "Version":
        """The token model that serves now; ServiceError where there is none."""
        return self._models.find(self.token_model)

    def token_engine(self, served: "Version | None" = None) -> "EngineClient":
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
