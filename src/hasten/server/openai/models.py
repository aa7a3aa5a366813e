"""Which models OpenAI's API has: every engine by the name of its token model, and by those of its text models."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from hasten.core.errors import EngineError
from hasten.core.types import SamplingParams
from hasten.server.call import note_model
from hasten.server.engine.client import EngineClient
from hasten.server.openai.params import OpenAIError

if TYPE_CHECKING:
    from hasten.server.service import Service
    from hasten.server.statistics import Tally

Key = tuple[str, str]
"""Model and version."""
_GENERATION = SamplingParams()


def models_by_id(engines: Iterable[Key], text_models: Mapping[str, str]) -> dict[str, Key]:
    """Model and version of the engines by the names that clients use; `text_models`: each with its token model.

    A name stands for the newest version, `MODEL:VERSION` for another one. Names of text models come first: one is
    called as its checkpoint is, while the token model mostly has the name of its interface.
    """
    versions: dict[str, list[str]] = {}
    for name, version in engines:
        versions.setdefault(name, []).append(version)
    newest = {name: (name, max(numbers, key=int)) for name, numbers in sorted(versions.items())}
    models = {name: newest[token] for name, token in text_models.items() if token in newest} | newest
    for name, numbers in versions.items():
        if len(numbers) > 1:
            models |= {f"{name}:{version}": (name, version) for version in sorted(numbers, key=int)}
    return models


@dataclass(frozen=True)
class Found:
    """A model that serves."""

    name: str
    client: EngineClient
    start: Callable[..., "Tally"]
    """Returns the tally of a request, from its number of items and its start; see Service.tally."""
    begun: int = field(default_factory=time.monotonic_ns)
    """When a request asked for it."""

    def tally(self, items: int, *, stream: bool = False) -> "Tally":
        """The tally of the request that it was found for, which has this number of items. To be closed."""
        return self.start(items, self.begun, stream=stream)


_Serving = Mapping[str, tuple[Key, EngineClient]]
"""Engines by the names that clients use."""


class ModelFinder:
    """Finds engines by the names that clients use. Its methods raise OpenAIError where there is no such model."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._serving: _Serving = {}
        self._as_of = -1
        """The service's count of changes at that time."""

    def names(self) -> list[str]:
        """All names."""
        return list(self._served())

    def find(self, name: str) -> Found:
        """The model of this name, whether or not its engine is ready."""
        self._service.check_open()
        serving = self._served()
        if name not in serving:
            message = f"the model {name!r:.200} does not exist; there are: {', '.join(serving) or 'none'}"
            raise OpenAIError(message, status=404, param="model", code="model_not_found")
        key, client = serving[name]
        note_model(name)
        return Found(name, client, partial(self._service.tally, *key))

    def find_any(self, name: str | None) -> Found:
        """The same; without a name, the only model that there is."""
        return self.find(self._only(self._served()) if name is None else name)

    def find_generator(self, name: str) -> Found:
        """The model of this name, whose engine is ready and generates text; EngineError where it is not ready."""
        found = self._ready(self.find(name))
        found.client.info.check_task(_GENERATION)
        return found

    def find_pooler(self, name: str | None) -> Found:
        """The same that makes vectors or scores of texts; without a name, the only one."""
        if name is None:
            serving = self._served()
            pooling = {each: (key, client) for each, (key, client) in serving.items() if client.info.pooling}
            name = self._only(pooling or serving)
        return self._ready(self.find(name))

    def _ready(self, found: Found) -> Found:
        if not found.client.ready:
            raise EngineError(f"the engine of model {found.name!r} is not ready; it starts again, try again soon")
        return found

    def _only(self, serving: _Serving) -> str:
        if len({key for key, _ in serving.values()}) > 1:
            raise OpenAIError(f"give the model; there are: {', '.join(serving)}", param="model")
        return next(iter(serving), "")

    def _served(self) -> _Serving:
        """What serves now."""
        if self._as_of != self._service.changes:
            engines = self._service.engines()
            by_id = models_by_id(engines, self._service.text_models())
            self._serving = {name: (key, engines[key]) for name, key in by_id.items()}
            self._as_of = self._service.changes
        return self._serving
