"""config.pbtxt: parsed by Triton's own schema, checked, and completed where it leaves something open.

What a configuration sets is honoured or is an error.
"""

import json
from collections.abc import Iterable

from google.protobuf import json_format, text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.server.json_size import check_json_size
from hasten.server.models.interfaces import (
    DEFAULT_MODEL_TYPE,
    INTERFACES,
    MODEL_TYPES,
    Interface,
    Kind,
    TensorRule,
    datatype_name,
)

_MAX_JSON_BYTES = 1 << 20
"""Of a configuration that comes over the network."""
BACKENDS = ("fastertransformer", "hasten")
_NOT_SUPPORTED = {
    "runtime": "there is one runtime",
    "batch_input": "requests are batched without padding",
    "batch_output": "requests are batched without padding",
    "sequence_batching": "every request stands for itself",
    "cc_model_filenames": "one checkpoint serves every GPU",
    "metric_tags": "metrics have the labels model and version",
    "model_warmup": "an engine warms up by itself",
    "model_operations": "there are no libraries to load",
    "model_repository_agents": "there are no repository agents",
    "model_metrics": "the buckets of histograms are fixed",
}
"""Fields of a configuration that no model honours, and why there is no need."""
_ENSEMBLE_NOT_SUPPORTED = {
    "backend": "its steps are models with backends of their own",
    "instance_group": "its steps run where their models do",
    "default_model_filename": "it has no weights",
}
_BATCHING_NOT_SUPPORTED = {
    "preferred_batch_size": "a request joins the running batch at the next step",
    "max_queue_delay_microseconds": "no request waits for others to come",
    "preserve_ordering": "a response is sent when it is there",
    "priority_queue_policy": "all priorities share one queue; set default_queue_policy",
}


def parse_config(text: str, source: str) -> model_config_pb2.ModelConfig:
    """Read config.pbtxt's text; ConfigError with file, line and column for what the schema does not have."""
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigError(f"{source}:{error}") from error


def parse_config_json(text: str) -> model_config_pb2.ModelConfig:
    """Read a configuration as JSON, the way the load call overrides one; ConfigError for what the schema lacks."""
    try:
        check_json_size(text.encode(errors="replace"), max_bytes=_MAX_JSON_BYTES)
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ConfigError("the load parameter 'config' must be a JSON object")
        return json_format.ParseDict(raw, model_config_pb2.ModelConfig())
    except (InvalidRequestError, json_format.ParseError, ValueError, RecursionError) as error:
        raise ConfigError(f"the load parameter 'config' is not a model configuration: {error}") from error


def kind_of(config: model_config_pb2.ModelConfig) -> Kind:
    """What a model does; ConfigError where its backend, platform or parameter `kind` is not known."""
    if config.platform == "ensemble" or (not config.backend and config.HasField("ensemble_scheduling")):
        return Kind.ENSEMBLE
    if config.platform:
        raise wrong(config, f"platform {config.platform!r} is not supported; there is 'ensemble'")
    if config.backend not in ("", *BACKENDS):
        raise wrong(config, f"backend {config.backend!r} is not supported; there are {' and '.join(BACKENDS)}")
    name = config.parameters["kind"].string_value if "kind" in config.parameters else Kind.TOKEN.value
    kinds = [kind.value for kind in INTERFACES]
    if name not in kinds or (config.backend == "fastertransformer" and name != Kind.TOKEN.value):
        raise wrong(config, f"parameter 'kind' {name!r} is not one of backend hasten's: {', '.join(kinds)}")
    return Kind(name)


def completed(
    given: model_config_pb2.ModelConfig, name: str, *, auto_complete: bool = True
) -> model_config_pb2.ModelConfig:
    """The configuration of the model `name`, checked, with defaults in place of what it leaves open.

    With `auto_complete`, tensors of its kind that it does not list are added, as Triton's backends do.
    """
    config = model_config_pb2.ModelConfig()
    config.CopyFrom(given)
    if config.name not in ("", name):
        raise ConfigError(
            f"unexpected directory name '{name}' for model '{config.name}', directory name must equal model name"
        )
    config.name = name
    kind = kind_of(config)
    _check_fields(config, kind)
    if kind is Kind.ENSEMBLE:
        config.platform = "ensemble"
        _check_tensors(config)
        if reshaped := [tensor.name for tensor in (*config.input, *config.output) if tensor.HasField("reshape")]:
            raise wrong(config, f"tensor '{reshaped[0]}' of an ensemble cannot be reshaped; remove reshape")
    else:
        config.backend = config.backend or "hasten"
        _complete_tensors(config, kind, auto_complete)
    _complete_defaults(config, kind)
    return config


def is_decoupled(config: model_config_pb2.ModelConfig) -> bool:
    """Whether a request may have several responses."""
    return config.model_transaction_policy.decoupled


def parameter(config: model_config_pb2.ModelConfig, name: str, default: str) -> str:
    """The text of one of a model's parameters."""
    return config.parameters[name].string_value if name in config.parameters else default


def interface_of(config: model_config_pb2.ModelConfig, kind: Kind) -> Interface:
    """The tensors that a model of this kind takes and gives."""
    if kind is not Kind.TOKEN:
        return INTERFACES[kind]
    return MODEL_TYPES.get(parameter(config, "model_type", DEFAULT_MODEL_TYPE), INTERFACES[kind])


def wrong(config: model_config_pb2.ModelConfig, message: str) -> ConfigError:
    """The error of a model's configuration."""
    return ConfigError(f"model '{config.name}': {message}")


def _set_fields(message: Message) -> list[str]:
    return [field.name for field, _ in message.ListFields()]


def _refuse(config: model_config_pb2.ModelConfig, where: str, message: Message, reasons: dict[str, str]) -> None:
    for field in _set_fields(message):
        if field in reasons:
            raise wrong(config, f"{where}{field} is not supported: {reasons[field]}; remove it")


def _check_fields(config: model_config_pb2.ModelConfig, kind: Kind) -> None:
    _refuse(config, "", config, _NOT_SUPPORTED)
    if config.max_batch_size < 0:
        raise wrong(config, f"max_batch_size must not be negative, got {config.max_batch_size}")
    if config.response_cache.enable:
        raise wrong(config, "response_cache is not supported: the engine shares the cache of prompts that begin alike")
    if config.HasField("optimization"):
        _check_optimization(config)
    if config.HasField("dynamic_batching"):
        _check_batching(config, kind)
    if (kind is Kind.ENSEMBLE) != config.HasField("ensemble_scheduling"):
        raise wrong(config, "ensemble_scheduling belongs to a model with platform 'ensemble', and to no other")
    if kind is Kind.ENSEMBLE:
        _refuse(config, "", config, _ENSEMBLE_NOT_SUPPORTED)
        limit = {"max_inflight_requests": "responses go on as fast as the client reads them"}
        _refuse(config, "ensemble_scheduling.", config.ensemble_scheduling, limit)
    elif kind is not Kind.TOKEN and config.default_model_filename:
        raise wrong(config, "default_model_filename belongs to the model that has the weights; remove it")
    _check_instances(config, kind)


def _check_optimization(config: model_config_pb2.ModelConfig) -> None:
    """Triton reports these fields with their defaults, so that they come back in a configuration that it gave."""
    default = _default_optimization()
    for field, value in config.optimization.ListFields():
        if value != getattr(default, field.name):
            raise wrong(config, f"optimization.{field.name} is not supported; remove it")


def _default_optimization() -> model_config_pb2.ModelOptimizationPolicy:
    policy = model_config_pb2.ModelOptimizationPolicy()
    policy.input_pinned_memory.enable = policy.output_pinned_memory.enable = True
    return policy


def _check_batching(config: model_config_pb2.ModelConfig, kind: Kind) -> None:
    if kind is not Kind.TOKEN:
        raise wrong(config, "dynamic_batching belongs to the model that has the engine")
    batching = config.dynamic_batching
    _refuse(config, "dynamic_batching.", batching, _BATCHING_NOT_SUPPORTED)
    policy = batching.default_queue_policy
    if policy.timeout_action != model_config_pb2.ModelQueuePolicy.REJECT:
        raise wrong(config, "dynamic_batching.default_queue_policy.timeout_action must be REJECT")
    levels, default = batching.priority_levels, batching.default_priority_level
    if levels and not 1 <= default <= levels:
        raise wrong(config, f"default_priority_level must be from 1 to priority_levels ({levels}), got {default}")
    if default and not levels:
        raise wrong(config, "default_priority_level needs priority_levels")


def _check_instances(config: model_config_pb2.ModelConfig, kind: Kind) -> None:
    if len(config.instance_group) > 1:
        raise wrong(config, "several instance_groups are not supported: set count in one of them")
    for group in config.instance_group:
        if kind is not Kind.TOKEN and group.count > 1:
            raise wrong(config, f"instance_group count {group.count} belongs to the model that has the engines")
        if group.count < 0:
            raise wrong(config, f"instance_group count must be at least 1, got {group.count}")
        if kind is not Kind.TOKEN and group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU:
            raise wrong(config, "instance_group kind KIND_GPU belongs to the model that has the engine")
        others = [name for name in _set_fields(group) if name not in ("name", "kind", "count")]
        if others:
            raise wrong(config, f"instance_group {others[0]} is not supported; to choose a GPU, set parameter 'device'")


def _check_tensors(config: model_config_pb2.ModelConfig) -> None:
    """What any model's tensors must be like."""
    for tensor in (*config.input, *config.output):
        if not tensor.name or tensor.data_type not in model_config_pb2.DataType.values()[1:]:
            raise wrong(config, f"tensor '{tensor.name}' needs a name and a data_type")
        if not tensor.dims and not tensor.HasField("reshape"):
            raise wrong(config, f"tensor '{tensor.name}' needs dims")
        if any(dim == 0 or dim < -1 for dim in tensor.dims):
            raise wrong(config, f"tensor '{tensor.name}' has dims {list(tensor.dims)}; each must be -1 or positive")
        for field in ("format", "is_shape_tensor", "is_non_linear_format_io", "label_filename"):
            if getattr(tensor, field, None):
                raise wrong(config, f"tensor '{tensor.name}': {field} is not supported; remove it")
    for names in ([tensor.name for tensor in config.input], [tensor.name for tensor in config.output]):
        twice = [name for index, name in enumerate(names) if name in names[:index]]
        if twice:
            raise wrong(config, f"tensor '{twice[0]}' is listed twice")


def _complete_tensors(config: model_config_pb2.ModelConfig, kind: Kind, auto_complete: bool) -> None:
    interface = interface_of(config, kind)
    _check_tensors(config)
    _check_rules(config, "input", config.input, interface.inputs)
    _check_rules(config, "output", config.output, interface.outputs)
    for tensor in config.input:
        rule = next(rule for rule in interface.inputs if rule.name == tensor.name)
        if tensor.optional and not rule.optional:
            raise wrong(config, f"input '{tensor.name}' cannot be optional")
    inputs, outputs = {tensor.name for tensor in config.input}, {tensor.name for tensor in config.output}
    missing = [rule.name for rule in interface.inputs if rule.name not in inputs and not rule.optional]
    if not auto_complete and (missing or not outputs):
        raise wrong(config, f"inputs {missing} and outputs must be listed, since configurations are not completed")
    if auto_complete:
        config.input.extend(rule.as_input() for rule in interface.inputs if rule.name not in inputs)
        config.output.extend(rule.as_output() for rule in interface.outputs if rule.name not in outputs)
        config.max_batch_size = config.max_batch_size or interface.max_batch_size
    if bool(config.max_batch_size) != bool(interface.max_batch_size):
        wanted = "at least 1" if interface.max_batch_size else "0"
        raise wrong(config, f"max_batch_size must be {wanted} for a model of kind {kind.value}")


def _check_rules(
    config: model_config_pb2.ModelConfig,
    what: str,
    tensors: Iterable[model_config_pb2.ModelInput | model_config_pb2.ModelOutput],
    rules: tuple[TensorRule, ...],
) -> None:
    known = {rule.name: rule for rule in rules}
    for tensor in tensors:
        rule = known.get(tensor.name)
        if rule is None:
            raise wrong(config, f"{what} '{tensor.name}' is not one of the model's: {', '.join(known)}")
        if datatype_name(tensor.data_type) != rule.datatype:
            found = datatype_name(tensor.data_type)
            raise wrong(config, f"{what} '{tensor.name}' has data type {found}, but the model's is {rule.datatype}")
        dims, shape = list(tensor.dims), list(tensor.reshape.shape)
        if len(dims) != len(rule.dims) or any(
            wanted not in (-1, dim) for dim, wanted in zip(dims, rule.dims, strict=True)
        ):
            raise wrong(config, f"{what} '{tensor.name}' has dims {dims}, but the model's are {list(rule.dims)}")
        if tensor.HasField("reshape") and shape != dims and (shape or dims != [1]):
            raise wrong(config, f"{what} '{tensor.name}' cannot be reshaped to {shape}; remove reshape")


def _complete_defaults(config: model_config_pb2.ModelConfig, kind: Kind) -> None:
    """What Triton fills in, so that the configuration that it reports is complete."""
    if not config.HasField("version_policy"):
        config.version_policy.latest.num_versions = 1
    policy = config.version_policy
    if policy.HasField("latest") and policy.latest.num_versions < 1:
        policy.latest.num_versions = 1
    if kind is Kind.TEXT and not config.HasField("model_transaction_policy"):
        config.model_transaction_policy.decoupled = True
    if is_decoupled(config) and kind not in (Kind.TOKEN, Kind.TEXT, Kind.ENSEMBLE):
        raise wrong(config, "a model of this kind gives one response; remove model_transaction_policy")
    if kind is Kind.ENSEMBLE:
        return
    config.optimization.CopyFrom(_default_optimization())
    if not config.instance_group:
        config.instance_group.add()
    group = config.instance_group[0]
    group.name, group.count = group.name or f"{config.name}_0", group.count or 1
    if group.kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
