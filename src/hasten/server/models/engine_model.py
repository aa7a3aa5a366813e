"""What token models have in common: each version owns its engine."""

from hasten.server.engine.client import EngineClient


class EngineModel:
    """A version of a model with an engine of its own, which ends with it."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    @property
    def ready(self) -> bool:
        """Whether the engine's process lives and has loaded the model."""
        return self._engine.ready

    @property
    def engine(self) -> EngineClient:
        """The engine."""
        return self._engine

    async def close(self, timeout: float) -> None:
        """Wait, for `timeout` seconds at most, for what other models still compute with the engine, and end it."""
        await self._engine.drain(timeout)
        await self._engine.close()
