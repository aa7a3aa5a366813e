"""Which models OpenAI's API has: every engine by the name of its token model, and by those of its text models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from hasten.server.engine.client import EngineClient
from hasten.server.statistics import Counters

if TYPE_CHECKING:
    from hasten.server.service import IndexEntry

Key = tuple[str, str]
"""Model and version."""


class Models(Protocol):
    """What this API needs of the service."""

    @property
    def counters(self) -> Counters:
        """What is counted of each model."""

    def check_open(self) -> None:
        """HastenError once the server takes no more requests."""

    def engines(self) -> Mapping[Key, EngineClient]:
        """The engines by model and version."""

    def index(self, *, ready: bool = False) -> "Sequence[IndexEntry]":
        """All models and their states."""

    def text_models(self) -> Mapping[str, str]:
        """The text models, each with the token model whose engine it uses."""


def models_by_id(service: Models) -> dict[str, Key]:
    """Model and version of the engines by the names that clients use.

    A name stands for the newest version, `MODEL:VERSION` for another one. Names of text models come first: one is
    called as its checkpoint is, while the token model mostly has the name of its interface.
    """
    versions: dict[str, list[str]] = {}
    for name, version in service.engines():
        versions.setdefault(name, []).append(version)
    newest = {name: (name, max(numbers, key=int)) for name, numbers in sorted(versions.items())}
    made = {name: newest[token] for name, token in service.text_models().items() if token in newest} | newest
    for name, numbers in versions.items():
        if len(numbers) > 1:
            made |= {f"{name}:{version}": (name, version) for version in sorted(numbers, key=int)}
    return made
