"""hasten takes a Hugging Face checkpoint to a measured, faster language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.core.errors import (
        CapacityError,
        CheckpointError,
        ChecksumError,
        ClusterError,
        ConfigError,
        EngineError,
        ExistsError,
        HastenError,
        InvalidRequestError,
        NotFoundError,
        RankError,
        UnsupportedError,
    )
    from hasten.core.types import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams
    from hasten.engine.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CapacityError",
    "CheckpointError",
    "ChecksumError",
    "ClusterError",
    "CompletionOutput",
    "ConfigError",
    "EngineError",
    "ExistsError",
    "FinishReason",
    "HastenError",
    "InvalidRequestError",
    "Logprob",
    "NotFoundError",
    "RankError",
    "RequestOutput",
    "SamplingParams",
    "UnsupportedError",
    "__version__",
]

_TYPES = {"CompletionOutput", "FinishReason", "Logprob", "RequestOutput", "SamplingParams"}


def _module_of(name: str) -> str:
    if name == "LLM":
        return "hasten.engine.llm"
    return "hasten.core.types" if name in _TYPES else "hasten.core.errors"


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `import hasten` alone does not take torch's time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_module_of(name)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
