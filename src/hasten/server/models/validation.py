"""Whether a request fits a model's configuration. The texts are Triton's, and so is the order of the checks."""

import math
from collections.abc import Iterable, Mapping

from tritonclient.grpc import model_config_pb2

from hasten.server.engine.queue import Queueing
from hasten.server.models.config import kind_of
from hasten.server.models.interfaces import TEXT_KINDS, datatype_name
from hasten.server.models.work import Work
from hasten.server.protocol.tensors import NUMPY, about
from hasten.server.types import InferRequest, Parameter, Tensor, invalid

_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try "
    "setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
EMPTY_FINAL = "triton_enable_empty_final_response"
_RESERVED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "priority": ((int,), "int64_param or uint64_param"),
    "timeout": ((int,), "int64_param"),
    "sequence_id": ((int, str), "int64_param or string_param"),
    "sequence_start": ((bool,), "bool_param"),
    "sequence_end": ((bool,), "bool_param"),
    "binary_data_output": ((bool,), "bool_param"),
    EMPTY_FINAL: ((bool,), "bool_param"),
    "cache_salt": ((str,), "string_param"),
    "headers": ((bool, int, float, str), "any type"),
}
"""Parameters of a request that are the protocol's and not the model's: their types, and what messages call these."""
_NOT_NEGATIVE = ("priority", "timeout")


class Rules:
    """One model's configuration, as its requests are held against it."""

    def __init__(self, config: model_config_pb2.ModelConfig, version: int = 1) -> None:
        self.name = config.name
        self._version = str(version)
        self._may_add_batch = kind_of(config) in TEXT_KINDS
        """Whether inputs may have a batch axis of 1 although the model has none: TensorRT-LLM's clients send one."""
        self.inputs = {tensor.name: (datatype_name(tensor.data_type), tuple(tensor.dims)) for tensor in config.input}
        """Data types and shapes, without the batch axis, -1 for any size."""
        self.outputs = [tensor.name for tensor in config.output]
        self.max_batch_size = config.max_batch_size
        self._required = [tensor.name for tensor in config.input if not tensor.optional]
        batching = config.dynamic_batching
        self._levels, self._default_level = batching.priority_levels, batching.default_priority_level
        policy = batching.default_queue_policy
        self._may_override = policy.allow_timeout_override or not config.HasField("dynamic_batching")
        self._default_timeout = policy.default_timeout_microseconds

    def work(self, request: InferRequest) -> Work:
        """The request as the model gets it; ServiceError with Triton's text where it does not fit."""
        own = _own_parameters(request.parameters)
        inputs = self._unique(request)
        for at, output in enumerate(request.outputs):
            if any(output.name == earlier.name for earlier in request.outputs[:at]):
                raise invalid(f"output '{output.name}' already exists in request")
            if output.name not in self.outputs:
                raise invalid(f"unexpected inference output '{output.name}' for model '{self.name}'")
        prefix = about(request.id)
        self._check_count(inputs, prefix)
        added = self._may_add_batch and self._has_unit_batch(inputs)
        if added:
            inputs = {name: _without_batch(tensor) for name, tensor in inputs.items()}
        batch_size = self._check_inputs(inputs, prefix)
        return Work(
            id=request.id,
            model=self.name,
            inputs=inputs,
            batch_size=1 if added else batch_size,
            outputs=frozenset(output.name for output in request.outputs) or frozenset(self.outputs),
            parameters=own,
            queueing=self._queueing(request.parameters),
            version=self._version,
        )

    def _unique(self, request: InferRequest) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for tensor in request.inputs:
            if tensor.name in inputs:
                raise invalid(f"{about(request.id)}input '{tensor.name}' already exists in request")
            inputs[tensor.name] = tensor
        return inputs

    def _has_unit_batch(self, inputs: Mapping[str, Tensor]) -> bool:
        return all(
            name in self.inputs and tensor.shape[:1] == (1,) and len(tensor.shape) == 1 + len(self.inputs[name][1])
            for name, tensor in inputs.items()
        )

    def _check_count(self, inputs: Mapping[str, Tensor], prefix: str) -> None:
        most, least, count = len(self.inputs), len(self._required), len(inputs)
        missing = [name for name in self._required if name not in inputs]
        # where the number is right, Triton looks at the names that it does not know first
        known = all(name in self.inputs for name in inputs)
        if least <= count <= most and not (missing and known):
            return
        expected = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
        raise invalid(
            f"{prefix}expected {expected} but got {count} inputs for model '{self.name}'. Got input(s) "
            f"[{_quoted(inputs)}], but missing required input(s) [{_quoted(missing)}]. Please provide all required "
            "input(s)."
        )

    def _check_inputs(self, inputs: Mapping[str, Tensor], prefix: str) -> int:
        """Names, batch axes, types, shapes and sizes; returns the batch size."""
        tensors = list(inputs.values())
        for tensor in tensors:
            if tensor.name not in self.inputs:
                raise invalid(f"unexpected inference input '{tensor.name}' for model '{self.name}'")
        batch = self._batch_size(tensors, prefix) if self.max_batch_size else 0
        for tensor in tensors:
            self._check_tensor(tensor, prefix)
        if self.max_batch_size and batch == 0:
            size = math.prod(tensors[0].shape[1:]) * NUMPY[tensors[0].datatype].itemsize
            raise invalid(f"{prefix}{self._size_mismatch(tensors[0], size, 0)}")
        return batch

    def _batch_size(self, tensors: Iterable[Tensor], prefix: str) -> int:
        batch = 0
        for tensor in tensors:
            if not tensor.shape:
                text = f"input '{tensor.name}' has no shape but model requires batch dimension for '{self.name}'"
                raise invalid(f"{prefix}{text}")
            if batch and tensor.shape[0] != batch:
                text = f"input '{tensor.name}' batch size does not match other inputs for '{self.name}'"
                raise invalid(f"{prefix}{text}")
            batch = tensor.shape[0]
        if batch > self.max_batch_size:
            text = f"inference request batch-size must be <= {self.max_batch_size} for '{self.name}'"
            raise invalid(f"{prefix}{text}")
        return batch

    def _check_tensor(self, tensor: Tensor, prefix: str) -> None:
        wanted, dims = self.inputs[tensor.name]
        if tensor.datatype != wanted:
            found = tensor.datatype if tensor.datatype in NUMPY else "<invalid>"
            raise invalid(
                f"{prefix}inference input '{tensor.name}' data-type is '{found}', but model '{self.name}' "
                f"expects '{wanted}'"
            )
        shape = tensor.shape[1:] if self.max_batch_size else tensor.shape
        fits = len(shape) == len(dims)
        if fits and -1 in shape:
            where = f"input '{tensor.name}' for model '{self.name}', got [{_joined(tensor.shape)}]"
            raise invalid(f"{prefix}All input dimensions should be specified for {where}")
        for size, dim in zip(shape, dims, strict=False):
            fits = fits and size >= 0 and dim in (-1, size)
        if not fits:
            full = [-1, *dims] if self.max_batch_size else dims
            raise invalid(
                f"{prefix}unexpected shape for input '{tensor.name}' for model '{self.name}'. Expected "
                f"[{_joined(full)}], got [{_joined(tensor.shape)}]. {_NOTE if self.max_batch_size else ''}"
            )
        self._check_data(tensor, prefix)

    def _check_data(self, tensor: Tensor, prefix: str) -> None:
        """Whether the data are what the tensor says of them."""
        dtype, data = NUMPY[tensor.datatype], tensor.data
        if data.shape != tensor.shape:
            size = math.prod(tensor.shape) * dtype.itemsize
            raise invalid(f"{prefix}{self._size_mismatch(tensor, size, data.nbytes)}")
        if data.dtype != dtype:
            raise invalid(
                f"{prefix}input '{tensor.name}' has data of {data.dtype}, but is said to be {tensor.datatype}"
            )
        if dtype.hasobject and not all(isinstance(item, bytes) for item in data.ravel().tolist()):
            raise invalid(f"{prefix}input '{tensor.name}' has elements that are not bytes")

    def _size_mismatch(self, tensor: Tensor, expected: int, got: int) -> str:
        where = f"input byte size mismatch for input '{tensor.name}' for model '{self.name}'"
        return f"{where}. Expected {expected}, got {got}"

    def _queueing(self, parameters: Mapping[str, Parameter]) -> Queueing:
        """How the engine lets it wait: with priority_levels, what is none of them is the default one.

        Its timeout, in microseconds, can shorten the engine's, if it counts at all.
        """
        priority, timeout = (int(parameters.get(name, 0)) for name in _NOT_NEGATIVE)
        if self._levels and not 1 <= priority <= self._levels:
            priority = self._default_level
        seconds = min(timeout, self._default_timeout or timeout) / 1e6 if timeout > 0 and self._may_override else None
        salt = parameters.get("cache_salt")
        return Queueing(priority, seconds, salt if isinstance(salt, str) else None)


def _without_batch(tensor: Tensor) -> Tensor:
    data = tensor.data[0] if tensor.data.shape == tensor.shape else tensor.data
    return Tensor(tensor.name, tensor.datatype, tensor.shape[1:], data)


def _quoted(names: Iterable[str]) -> str:
    return ",".join(f"'{name}'" for name in names)


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _own_parameters(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The model's own parameters; ServiceError with Triton's text where one of the protocol's is wrong."""
    for name, value in parameters.items():
        if name in _RESERVED:
            types, expected = _RESERVED[name]
            if type(value) not in types:
                raise invalid(f"invalid value type for '{name}' parameter, expected {expected}.")
            if name in _NOT_NEGATIVE and isinstance(value, int) and value < 0:
                raise invalid(f"invalid value for '{name}', expected value >= 0.")
        elif name.startswith("triton_"):
            raise invalid(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                f"starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
    return {name: value for name, value in parameters.items() if name not in _RESERVED}
