"""Parameters of a token model's configuration and the engine's configuration, each from the other.

FasterTransformer's names come first; every option of EngineConfig may be given by its own name besides.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from hasten.checkpoint.faster_transformer.ini import INT8_MODES, NO_SMOOTHQUANT
from hasten.core.config import EngineConfig
from hasten.core.dtypes import dtype_name
from hasten.core.errors import ConfigError
from hasten.server.engine.queue import QueueLimits
from hasten.server.models.config import kind_of, parameter, wrong
from hasten.server.models.interfaces import DEFAULT_MODEL_TYPE, MODEL_TYPES, TEXT_KINDS, Kind

CHECKPOINT = "model_checkpoint_path"
TOKENIZER = "tokenizer_path"
INT8_MODE = "int8_mode"
KIND = "kind"
TOKEN_MODEL = "token_model"
DEFAULT_TOKEN_MODEL = "fastertransformer"
_ALIASES = {
    "tensor_para_size": "tensor_parallel_size",
    "pipeline_para_size": "pipeline_parallel_size",
    "data_type": "dtype",
    TOKENIZER: "tokenizer",
    INT8_MODE: "quantization",
}
"""FasterTransformer's name of an option, and the engine's."""
_FIXED = {
    "model_type": (
        tuple(MODEL_TYPES),
        "all decoder-only models but GPT-J and GPT-NeoX are GPT here, all encoder-decoders are T5, and all models of "
        "vectors are bert",
    ),
    # ranks use each other's memory for sums wherever their GPUs can reach it, and the results are the same
    "enable_custom_all_reduce": (("0", "1"), "it is 0 or 1"),
}
"""FasterTransformer's parameters that choose nothing of the engine: values that ask for no more, and why there are no
others."""
_ALLOWED = {
    **dict.fromkeys(TEXT_KINDS, (KIND, TOKEN_MODEL)),
    Kind.PREPROCESSING: (KIND, TOKEN_MODEL, TOKENIZER),
    Kind.POSTPROCESSING: (KIND, TOKEN_MODEL, TOKENIZER),
    Kind.ENSEMBLE: (),
}
_GPU = model_config_pb2.ModelInstanceGroup.KIND_GPU
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def check_parameters(config: model_config_pb2.ModelConfig, kind: Kind) -> None:
    """ConfigError for a parameter that a model of this kind does not know, or whose value it does not take."""
    if kind is Kind.TOKEN:
        engine_options(config)
        return
    for name in config.parameters:
        if name not in _ALLOWED[kind]:
            known = ", ".join(_ALLOWED[kind]) or "none"
            raise wrong(config, f"parameter '{name}' is not known; there are: {known}")


def engine_options(config: model_config_pb2.ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `EngineConfig.create` but for the checkpoint; ConfigError names a wrong parameter."""
    options: dict[str, Any] = {}
    hints = option_hints()
    for name, value in sorted(config.parameters.items()):
        text, where = value.string_value, f"model '{config.name}': parameter '{name}'"
        if name in _FIXED:
            values, reason = _FIXED[name]
            if text not in values:
                raise ConfigError(f"{where} is {text!r}, but must be {' or '.join(values)}: {reason}")
            continue
        if name in (CHECKPOINT, KIND):
            continue
        if name == INT8_MODE:
            if text not in INT8_MODES:
                raise ConfigError(f"{where} is {text!r}, but must be 0 or 1: {NO_SMOOTHQUANT}")
            if (scheme := INT8_MODES[text]) is None:
                continue
            text = scheme
        option = _ALIASES.get(name, name)
        if option not in hints:
            known = ", ".join((CHECKPOINT, *_FIXED, *_ALIASES, *sorted(hints)))
            raise ConfigError(f"{where} is not known; there are: {known}")
        if option in options:
            raise ConfigError(f"{where} says the same as another one; remove one of them")
        options[option] = _read(text, hints[option], where)
    on_gpu = any(group.kind == _GPU for group in config.instance_group)
    if on_gpu and options.setdefault("device", "cuda") == "cpu":
        raise wrong(config, "parameter 'device' is 'cpu', but its instance_group is KIND_GPU")
    if "dtype" in options and options["dtype"] != "auto":
        options["dtype"] = dtype_name(options["dtype"])
    return options


def engine_parameters(config: EngineConfig, model_type: str = DEFAULT_MODEL_TYPE) -> dict[str, str]:
    """Parameters that give this configuration, FasterTransformer's own ones among them; defaults are left out."""
    modes = {scheme: mode for mode, scheme in INT8_MODES.items()}
    parameters = {
        "tensor_para_size": str(config.parallel.tensor_parallel_size),
        "pipeline_para_size": str(config.parallel.pipeline_parallel_size),
        "model_type": model_type,
        CHECKPOINT: config.model,
        INT8_MODE: "0",
        "enable_custom_all_reduce": "0",
    }
    names = {option: name for name, option in _ALIASES.items()}
    for option, value, default in _flat(config):
        if value != default and option not in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = modes[value] if names.get(option) == INT8_MODE else value
            parameters[names.get(option, option)] = str(value).lower() if isinstance(value, bool) else str(value)
    return parameters


def token_model_of(config: model_config_pb2.ModelConfig) -> str:
    """Name of the token model whose engine a model uses; "" of one that uses none."""
    kind = kind_of(config)
    default = DEFAULT_TOKEN_MODEL if kind in TEXT_KINDS else ""
    return "" if kind in (Kind.TOKEN, Kind.ENSEMBLE) else parameter(config, TOKEN_MODEL, default)


def queue_limits(config: model_config_pb2.ModelConfig, limits: QueueLimits) -> QueueLimits:
    """Limits with what `dynamic_batching.default_queue_policy` says of the queue."""
    policy = config.dynamic_batching.default_queue_policy
    seconds = policy.default_timeout_microseconds / 1e6 or None
    return dataclasses.replace(limits, max_queue_size=policy.max_queue_size, default_timeout=seconds)


def option_hints() -> dict[str, Any]:
    """The options of an engine but for its checkpoint, with their types."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(EngineConfig).items():
        if dataclasses.is_dataclass(hint):
            hints |= typing.get_type_hints(hint)
        elif name != "model":
            hints[name] = hint
    return hints


def checkpoint_folder(config: model_config_pb2.ModelConfig, model_folder: Path, version_folder: Path) -> Path:
    """Where a version's weights lie.

    `model_checkpoint_path`, relative to the model's folder, or in the version's folder `default_model_filename` or
    `N-gpu` for N ranks as FasterTransformer has them, or the version's folder itself.
    """
    if CHECKPOINT in config.parameters:
        return model_folder / config.parameters[CHECKPOINT].string_value
    if config.default_model_filename:
        return version_folder / config.default_model_filename
    ranks = engine_options(config).get("tensor_parallel_size", 1)
    inside = version_folder / f"{ranks}-gpu"
    return inside if inside.is_dir() else version_folder


def _flat(config: Any) -> list[tuple[str, Any, Any]]:
    """Name, value and default of every option but the checkpoint."""
    flat: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat += _flat(value)
        elif field.name != "model":
            flat.append((field.name, value, field.default))
    return flat


def _read(text: str, hint: Any, where: str) -> Any:
    """A parameter's text as the option's type has it."""
    kind = next((part for part in typing.get_args(hint) if part is not types.NoneType), hint)
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{where} must be {_KINDS[kind]}, got {text!r}") from None
