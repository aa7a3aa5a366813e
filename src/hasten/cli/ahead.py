"""Work that a command with an engine begins before it imports torch, whose import takes seconds."""

import os
from collections.abc import Mapping
from typing import Any

from hasten.core import gpu_start
from hasten.core.config import EngineConfig
from hasten.core.gpu_weights import folder_of
from hasten.parallel.rank import rank_info


def begin(model: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Have a GPU read the weights while torch is imported, where this process computes alone.

    ConfigError as of the engine.
    """
    config = EngineConfig.create(model, **options)
    gpu_start.begin(None if rank_info(config.parallel) is not None else folder_of(config))
