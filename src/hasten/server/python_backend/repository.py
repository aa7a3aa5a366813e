"""A model repository for Triton's Python backend: the token model, with hasten's engine inside a real Triton.

Triton passes requests on at once, one engine computes them all, and each response goes back when it is there. So there
is one instance: a second one would load the model again.
"""

import sys
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.core.files import removed_on_failure, write_text
from hasten.server.create import model_configs
from hasten.server.models.parameters import DEFAULT_TOKEN_MODEL
from hasten.server.repository import CONFIG

ENVIRONMENT = "EXECUTION_ENV_PATH"
"""The backend's parameter for the Python environment that a model runs in."""
_MODEL_FILE = '''\
"""Triton's Python backend looks for its model here."""

from hasten.server.python_backend.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def create_triton_repository(
    engine: EngineConfig,
    target: Path,
    *,
    name: str = DEFAULT_TOKEN_MODEL,
    decoupled: bool = False,
    environment: Path | None = None,
) -> Path:
    """Write the model `name` into the repository `target` and return its folder; ConfigError if it exists.

    A `decoupled` model streams; Triton then refuses it to callers that expect one response. `environment` is the folder
    of the virtual environment that has hasten, by default the one that this runs in; without any, Triton takes the
    Python that is first on its PATH.
    """
    folder = target / name
    if folder.exists():
        raise ConfigError(f"{folder} exists; give another folder, or move it elsewhere first")
    version = folder / "1"
    config = _triton_config(engine, name, decoupled, environment or _own_environment())
    with removed_on_failure([folder]):
        version.mkdir(parents=True)
        write_text(folder / CONFIG, text_format.MessageToString(config))
        write_text(version / "model.py", _MODEL_FILE)
    return folder


def _triton_config(
    engine: EngineConfig, name: str, decoupled: bool, environment: Path | None
) -> model_config_pb2.ModelConfig:
    config = model_configs(engine, token_name=name, decoupled=decoupled)[0]
    config.backend = "python"
    config.ClearField("optimization")
    config.dynamic_batching.SetInParent()  # requests that are there together reach the model in one call
    if environment is not None:
        config.parameters[ENVIRONMENT].string_value = str(environment.resolve())
    return config


def _own_environment() -> Path | None:
    """The virtual environment that this program runs in, if it is one."""
    folder = Path(sys.prefix)
    return folder if (folder / "bin" / "activate").is_file() else None
