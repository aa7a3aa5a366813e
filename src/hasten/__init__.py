"""hasten: an inference engine and server for transformer language models."""

import gc

TYPE_CHECKING = False  # `typing` takes a command's first milliseconds, in which Ctrl-C shows Python's traceback
if TYPE_CHECKING:
    from typing import Any

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
    from hasten.core.types import (
        ClassificationOutput,
        CompletionOutput,
        EmbeddingOutput,
        FilledMask,
        FillMaskOutput,
        FinishReason,
        Logprob,
        PoolingOutput,
        PoolingParams,
        PoolingRequestOutput,
        RequestMetrics,
        RequestOutput,
        SamplingParams,
        ScoringOutput,
        StructuredOutputsParams,
    )
    from hasten.engine.async_llm import AsyncEngineArgs, AsyncLLM
    from hasten.engine.llm import LLM, run_worker
    from hasten.engine.prompts import TextPrompt, TokensPrompt

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "CapacityError",
    "CheckpointError",
    "ChecksumError",
    "ClassificationOutput",
    "ClusterError",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EngineError",
    "ExistsError",
    "FillMaskOutput",
    "FilledMask",
    "FinishReason",
    "HastenError",
    "InvalidRequestError",
    "Logprob",
    "NotFoundError",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RankError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "UnsupportedError",
    "__version__",
    "run_worker",
]

_MODULES = {
    **dict.fromkeys(("LLM", "run_worker"), "hasten.engine.llm"),
    **dict.fromkeys(("AsyncEngineArgs", "AsyncLLM"), "hasten.engine.async_llm"),
    **dict.fromkeys(("TextPrompt", "TokensPrompt"), "hasten.engine.prompts"),
    **dict.fromkeys(("CompletionOutput", "FinishReason", "Logprob"), "hasten.core.types"),
    **dict.fromkeys(("ClassificationOutput", "EmbeddingOutput", "PoolingOutput", "ScoringOutput"), "hasten.core.types"),
    **dict.fromkeys(("FillMaskOutput", "FilledMask", "PoolingParams", "PoolingRequestOutput"), "hasten.core.types"),
    **dict.fromkeys(
        ("RequestMetrics", "RequestOutput", "SamplingParams", "StructuredOutputsParams"), "hasten.core.types"
    ),
}
"""Where the names are that are no errors."""


def __getattr__(name: str) -> "Any":
    """Import what is asked for, so that `import hasten` alone does not take torch's time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    collects = gc.isenabled()
    gc.disable()  # imports leave nothing to collect, and looking for it takes a sixth of their time
    try:
        value = getattr(import_module(_MODULES.get(name, "hasten.core.errors")), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
