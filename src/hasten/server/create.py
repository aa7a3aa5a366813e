"""Repositories made for one checkpoint: the article's token model, FasterTransformer's ensemble around it, and text.

A model that generates no text has a token model and a text model alone. For Triton's own Python backend there is the
token model, with hasten's engine inside a real Triton: that passes requests on at once, one engine computes them all,
and each response goes back when it is there. So there is one instance: a second one would load the model again.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hasten.checkpoint.faster_transformer.ini import CONFIG_INI, ini_text, read_sections
from hasten.checkpoint.hub import model_name
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import removed_on_failure, write_text
from hasten.models.registry import architecture_of, has_encoder, task_of
from hasten.server.engine.queue import QueueLimits
from hasten.server.models.config import completed, interface_of, kind_of
from hasten.server.models.interfaces import (
    DEFAULT_MODEL_TYPE,
    ENCODER_DECODER_TYPE,
    ENCODER_TYPES,
    INTERFACES,
    POOLING_KINDS,
    Kind,
)
from hasten.server.models.parameters import DEFAULT_TOKEN_MODEL, KIND, TOKEN_MODEL, engine_parameters
from hasten.server.repository import CONFIG, is_model_name

_PREPROCESSING, _POSTPROCESSING, _ENSEMBLE = "preprocessing", "postprocessing", "ensemble"
_OWN = (_PREPROCESSING, _POSTPROCESSING, _ENSEMBLE)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_OUTPUT = "OUTPUT_0"
_ENSEMBLE_TEXTS = {"INPUT_0": "QUERY", "INPUT_1": "REQUEST_OUTPUT_LEN"}
_ENSEMBLE_TEXTS |= {"INPUT_2": "BAD_WORDS_DICT", "INPUT_3": "STOP_WORDS_DICT"}
"""The ensemble's own inputs, by the inputs of preprocessing that they become."""
_PREPARED = {"input_ids": "INPUT_ID", "input_lengths": "REQUEST_INPUT_LEN", "request_output_len": "REQUEST_OUTPUT_LEN"}
_PREPARED |= {"bad_words_list": "BAD_WORDS_IDS", "stop_words_list": "STOP_WORDS_IDS"}
"""The token model's inputs, by the outputs of preprocessing that they come from."""
_INNER_OUTPUTS = {"output_ids": "_TOKENS_BATCH", "response_input_lengths": "_RESPONSE_INPUT_LENGTHS"}
"""The token model's outputs that are not the ensemble's, and what they are called within it."""
_AFTER = {"output_ids": "TOKENS_BATCH", "response_input_lengths": "RESPONSE_INPUT_LENGTHS"}
"""The inputs of postprocessing that they become."""
_UNUSED = "context_embeddings"
"""Triton refuses an ensemble with a tensor that nothing takes."""


def model_configs(
    engine: EngineConfig,
    *,
    token_name: str = DEFAULT_TOKEN_MODEL,
    text_name: str | None = None,
    decoupled: bool = False,
    limits: QueueLimits | None = None,
) -> list[model_config_pb2.ModelConfig]:
    """Configurations of all models over one checkpoint; without a tokenizer, of the token model alone.

    `text_name`: what the text model is called (default: as the checkpoint's folder).
    """
    text_name = text_name or default_text_name(engine.model, token_name)
    names = (token_name, text_name, *_OWN)
    for name in names:
        if not is_model_name(name):
            raise ConfigError(f"a model cannot be called {name!r}, which is no name of a folder")
        if names.count(name) > 1:
            raise ConfigError(f"a model cannot be called {name!r}: another one is; choose another name for one of them")
    configs = [_token(engine, token_name, decoupled)]
    model_type = configs[0].parameters["model_type"].string_value
    kind = next((kind for kind, task in POOLING_KINDS.items() if ENCODER_TYPES[task] == model_type), None)
    if kind is not None and decoupled:
        raise ConfigError("decoupled is for models that generate text: there is nothing to stream of a vector")
    if limits is not None:
        policy = configs[0].dynamic_batching.default_queue_policy
        policy.max_queue_size, policy.allow_timeout_override = limits.max_queue_size, True
        policy.default_timeout_microseconds = round((limits.default_timeout or 0) * 1e6)
    if has_tokenizer(engine) and kind is not None:
        configs.append(_with_token_model(kind, text_name, token_name))
    elif has_tokenizer(engine) and model_type == ENCODER_DECODER_TYPE:
        # FasterTransformer has an ensemble for GPT's tensors alone
        configs.append(_with_token_model(Kind.TEXT, text_name, token_name))
    elif has_tokenizer(engine):
        configs += [
            _with_token_model(Kind.PREPROCESSING, _PREPROCESSING, token_name),
            _with_token_model(Kind.POSTPROCESSING, _POSTPROCESSING, token_name),
            _ensemble(configs[0]),
            _with_token_model(Kind.TEXT, text_name, token_name),
        ]
    return [completed(config, config.name) for config in configs]


def default_text_name(model: str, token_name: str = DEFAULT_TOKEN_MODEL) -> str:
    """The checkpoint's folder's name, its parent's for `N-gpu`, as far as a model can be called so."""
    name = model_name(model)
    return f"{name or 'model'}-text" if name in ("", token_name, *_OWN) else name


def has_tokenizer(engine: EngineConfig) -> bool:
    """Whether a tokenizer is named, or lies beside the weights or in the folder above `N-gpu`."""
    if engine.tokenizer is not None:
        return True
    folder = Path(engine.model)
    return any((parent / name).is_file() for parent in (folder, folder.parent) for name in _TOKENIZER_FILES)


def write_repository(configs: list[model_config_pb2.ModelConfig], target: Path, engine: EngineConfig) -> None:
    """Write NAME/config.pbtxt and NAME/1 for each, and 1/config.ini for a model that FasterTransformer had.

    ConfigError if `target` has one of them already; CheckpointError where the checkpoint cannot be read.
    """
    ini = _config_ini(engine)
    for config in configs:
        if (target / config.name).exists():
            raise ConfigError(f"{target / config.name} exists; give another folder, or move it elsewhere first")
    with removed_on_failure([target / config.name for config in configs]):
        for config in configs:
            version = target / config.name / "1"
            version.mkdir(parents=True)
            write_text(version.parent / CONFIG, _text(config))
            if ini is not None and kind_of(config) is Kind.TOKEN:
                write_text(version / "config.ini", ini)


def _text(config: model_config_pb2.ModelConfig) -> str:
    """config.pbtxt without what only says the default."""
    shown = model_config_pb2.ModelConfig()
    shown.CopyFrom(config)
    shown.ClearField("optimization")
    return text_format.MessageToString(shown)


def _config_ini(engine: EngineConfig) -> str | None:
    """What FasterTransformer's converter would say of the checkpoint; None for a model that it does not know."""
    # these import torch, which takes seconds, and nothing else here needs it
    from hasten.checkpoint.faster_transformer.folder import family_of
    from hasten.checkpoint.plan import open_checkpoint
    from hasten.core.dtypes import dtype_name

    ranks = engine.parallel.tensor_parallel_size
    config = open_checkpoint(engine.model, ranks).config
    engine.parallel.validate(config)
    engine.scheduler.validate(config)
    family = family_of(config.architecture)
    if family is None or family.why_not(config) is not None:
        return None
    dtype = config.dtype if engine.dtype == "auto" else dtype_name(engine.dtype)
    sections = family.sections(config, model_name(engine.model), ranks, dtype)
    return ini_text(sections, spaced=family.spaced)


_MODEL_TYPES = {
    "GPTJForCausalLM": "GPT-J",
    "GPTJModel": "GPT-J",
    "gptj": "GPT-J",
    "GPTNeoXForCausalLM": "GPT-NeoX",
    "GPTNeoXModel": "GPT-NeoX",
    "gptneox": "GPT-NeoX",
    "encoder": ENCODER_DECODER_TYPE,
    "bert": ENCODER_TYPES["embed"],
}
"""FasterTransformer's backends by architecture and by the section of its config.ini; that of all others is GPT's."""


def _model_type(folder: Path) -> str:
    """FasterTransformer's backend for a checkpoint; GPT's also where the engine will say what is wrong with it."""
    parents = (folder, folder.parent) if folder.name.endswith("-gpu") else (folder,)
    described = next((path for parent in parents if (path := parent / "config.json").is_file()), None)
    try:
        if described is not None:
            names = [architecture_of(json.loads(described.read_text(encoding="utf-8")))]
            task = task_of(names[0])
            if task == "generate" and (described.parent / "modules.json").is_file():
                task = "embed"
            if task != "generate":
                return ENCODER_TYPES[task]
            if has_encoder(names[0]):
                return ENCODER_DECODER_TYPE
        else:
            names = list(read_sections(folder / CONFIG_INI)) if (folder / CONFIG_INI).is_file() else []
    except (HastenError, ValueError, AttributeError, OSError):
        names = []
    return next((_MODEL_TYPES[name] for name in names if name in _MODEL_TYPES), DEFAULT_MODEL_TYPE)


def _token(engine: EngineConfig, name: str, decoupled: bool) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=name, backend="fastertransformer")
    config.model_transaction_policy.decoupled = decoupled
    for parameter, text in engine_parameters(engine, _model_type(Path(engine.model))).items():
        config.parameters[parameter].string_value = text
    return config


def _with_token_model(kind: Kind, name: str, token_name: str) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=name, backend="hasten")
    config.parameters[KIND].string_value = kind.value
    config.parameters[TOKEN_MODEL].string_value = token_name
    return config


def _ensemble(token_model: model_config_pb2.ModelConfig) -> model_config_pb2.ModelConfig:
    """Text to text by three steps; what the token model takes besides goes through under its own names."""
    before, after = INTERFACES[Kind.PREPROCESSING], INTERFACES[Kind.POSTPROCESSING]
    token = interface_of(token_model, Kind.TOKEN)
    inner_outputs = {rule.name: _INNER_OUTPUTS[rule.name] for rule in token.outputs if rule.name in _INNER_OUTPUTS}
    texts = {rule.name: rule for rule in before.inputs}
    passed = [replace(rule, scalar=False) for rule in token.inputs if rule.name not in _PREPARED]
    results = [rule for rule in token.outputs if rule.name not in (*_INNER_OUTPUTS, _UNUSED)]
    config = model_config_pb2.ModelConfig(name=_ENSEMBLE, platform="ensemble", max_batch_size=token.max_batch_size)
    config.input.extend(replace(texts[theirs], name=name).as_input() for name, theirs in _ENSEMBLE_TEXTS.items())
    config.input.extend(rule.as_input() for rule in passed)
    config.output.extend(rule.as_output() for rule in (replace(after.outputs[0], name=_OUTPUT), *results))
    _add_step(
        config,
        _PREPROCESSING,
        {theirs: name for name, theirs in _ENSEMBLE_TEXTS.items()},
        {rule.name: f"_{rule.name}" for rule in before.outputs},
    )
    _add_step(
        config,
        token_model.name,
        {name: f"_{source}" for name, source in _PREPARED.items()} | {rule.name: rule.name for rule in passed},
        inner_outputs | {rule.name: rule.name for rule in results},
    )
    inner = {_AFTER[name]: called for name, called in inner_outputs.items()} | {"SEQUENCE_LENGTH": "sequence_length"}
    _add_step(config, _POSTPROCESSING, inner, {after.outputs[0].name: _OUTPUT})
    return config


def _add_step(
    config: model_config_pb2.ModelConfig, name: str, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> None:
    step = config.ensemble_scheduling.step.add(model_name=name, model_version=-1)
    step.input_map.update(inputs)
    step.output_map.update(outputs)


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
