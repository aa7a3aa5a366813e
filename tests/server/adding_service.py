"""A small service in memory with the interface of `hasten.server.service.Service`: models that add, repeat and count.

Its models are those that a real Triton 2.51.0 served when the answers in these tests were recorded.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2

from hasten.server.models.interfaces import datatype_name
from hasten.server.models.validation import Rules
from hasten.server.protocol.tensors import NUMPY
from hasten.server.types import ErrorKind, InferRequest, InferResponse, ServiceError, Tensor
from hasten.server.version import version_number

_ADD = """
name: "add" backend: "python" max_batch_size: 64
version_policy { latest { num_versions: 1 } }
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "INPUT1" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "OUTPUT1" data_type: TYPE_FP32 dims: [ -1 ] } ]
optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } }
instance_group [ { name: "add_0" count: 1 kind: KIND_CPU } ] default_model_filename: "model.py"
"""
_TEXT = """
name: "text" backend: "python"
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "length" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "parameters" data_type: TYPE_STRING dims: [ 1 ] }
]
"""
_DECOUPLED = """
name: "decoupled" backend: "python" model_transaction_policy { decoupled: true }
input [
  { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "DELAY" data_type: TYPE_FP32 dims: [ 1 ] optional: true }
]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""
_SAME = """
name: "id_{name}" backend: "python"
input [ {{ name: "IN" data_type: TYPE_{kind} dims: [ -1 ] }} ]
output [ {{ name: "OUT" data_type: TYPE_{kind} dims: [ -1 ] }} ]
"""
EXTENSIONS = (
    "classification sequence model_repository model_repository(unload_dependents) schedule_policy model_configuration "
    "system_shared_memory cuda_shared_memory binary_tensor_data parameters statistics trace logging"
)
OWN_ERROR = "this is the model's own error"


@dataclass
class AddingService:
    """Version 1 of each model; `delay` is what `add` takes in seconds where its first value is -2."""

    delay: float = 1000.0
    begun: int = 0
    ended: int = 0
    withdrawn: int = 0
    """Of those that have ended: how many before they were done."""
    most_at_once: int = 0
    unloaded: set[str] = field(default_factory=set)
    loads: list[tuple[str, str | None, dict[str, bytes]]] = field(default_factory=list)
    ready: bool = True

    def __post_init__(self) -> None:
        kinds = [kind.replace("BYTES", "STRING") for kind in NUMPY]
        texts = [_ADD, _TEXT, _DECOUPLED, *(_SAME.format(name=kind.lower(), kind=kind) for kind in kinds)]
        configs = [text_format.Parse(text, model_config_pb2.ModelConfig()) for text in texts]
        self._configs = {config.name: config for config in configs}
        self._rules = {config.name: _rules(config) for config in configs}

    def model_config(self, model: str, version: str = "") -> Any:
        if model not in self._configs:
            raise ServiceError(ErrorKind.NOT_FOUND, f"Request for unknown model: '{model}' is not found")
        if model in self.unloaded:
            raise ServiceError(ErrorKind.NOT_FOUND, f"Request for unknown model: '{model}' has no available versions")
        if version_number(version) not in (-1, 1):
            text = f"Request for unknown model: '{model}' version {version} is not found"
            raise ServiceError(ErrorKind.NOT_FOUND, text)
        return self._configs[model]

    def is_decoupled(self, model: str, version: str = "") -> bool:
        return bool(self.model_config(model, version).model_transaction_policy.decoupled)

    async def infer(self, request: InferRequest) -> InferResponse:
        return [response async for response in self.stream(request)][-1]

    async def stream(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        config = self.model_config(request.model, request.version)
        work = self._rules[request.model].work(request)
        self.begun += 1
        self.most_at_once = max(self.most_at_once, self.begun - self.ended)
        finished = False
        try:
            if config.model_transaction_policy.decoupled:
                async for response in _count(request):
                    yield response
            else:
                outputs = await self._compute(request, work.inputs)
                kept = [output for output in outputs if output.name in work.outputs]
                yield InferResponse(request.model, "1", request.id, outputs=kept)
            finished = True
        except ServiceError:
            finished = True
            raise
        finally:
            self.ended += 1
            self.withdrawn += not finished

    async def _compute(self, request: InferRequest, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        if request.model == "text":
            return _said(request, inputs)
        if request.model != "add":
            given = inputs["IN"]
            return [Tensor("OUT", given.datatype, given.shape, given.data)]
        item, other = (inputs[name] for name in ("INPUT0", "INPUT1"))
        first = item.data.flat[0] if item.data.size else 0
        if first == -1:
            raise ServiceError(ErrorKind.INTERNAL, OWN_ERROR)
        if first == -2:
            await asyncio.sleep(self.delay)
        if first == -3:
            raise RuntimeError("a defect")
        pairs = {"OUTPUT0": item.data + other.data, "OUTPUT1": item.data - other.data}  # type: ignore[operator]
        return [Tensor(name, "FP32", item.shape, data) for name, data in pairs.items()]

    def server_metadata(self) -> Any:
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0", extensions=EXTENSIONS.split())

    def model_metadata(self, model: str, version: str = "") -> Any:
        config = self.model_config(model, version)
        batch = [-1] if config.max_batch_size else []
        message = service_pb2.ModelMetadataResponse(name=model, versions=["1"], platform=config.backend)
        for specs, described in ((config.input, message.inputs), (config.output, message.outputs)):
            for each in specs:
                described.add(name=each.name, datatype=datatype_name(each.data_type), shape=[*batch, *each.dims])
        return message

    def statistics(self, model: str = "", version: str = "") -> list[Any]:
        if model and (model not in self._configs or model in self.unloaded):
            raise ServiceError(ErrorKind.INVALID, f"requested model '{model}' is not available")
        nothing = service_pb2.StatisticDuration()
        names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        stats = service_pb2.InferStatistics(**dict.fromkeys((*names, "cache_hit", "cache_miss"), nothing))
        return [
            service_pb2.ModelStatistics(name=name, version="1", inference_stats=stats)
            for name in ([model] if model else sorted(self._configs))
        ]

    def index(self, *, ready: bool = False) -> list[Any]:
        entries = []
        for name in sorted(self._configs):
            gone = name in self.unloaded
            if not (ready and gone):
                state, reason = ("UNAVAILABLE", "unloaded") if gone else ("READY", "")
                entries.append(
                    service_pb2.RepositoryIndexResponse.ModelIndex(name=name, version="1", state=state, reason=reason)
                )
        return entries

    async def load(self, model: str, config_json: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        if model not in self._configs:
            text = f"failed to load '{model}', failed to poll from model repository"
            raise ServiceError(ErrorKind.INTERNAL, text)
        self.loads.append((model, config_json, dict(files or {})))
        self.unloaded.discard(model)

    async def unload(self, model: str, *, unload_dependents: bool = False) -> None:
        self.unloaded |= {model} & self._configs.keys()

    def is_ready(self) -> bool:
        return self.ready and not self.unloaded

    def is_model_ready(self, model: str, version: str = "") -> bool:
        try:
            self.model_config(model, version)
        except ServiceError as error:
            if error.kind is ErrorKind.NOT_FOUND:
                return False
            raise
        return True


def _rules(config: Any) -> Rules:
    """What hasten holds requests against; it knows its own backend alone."""
    own = model_config_pb2.ModelConfig()
    own.CopyFrom(config)
    own.backend = "hasten"
    return Rules(own)


def _said(request: InferRequest, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    import json

    words = np.array([b"you said: " + text for text in inputs["text_input"].data.tolist()], dtype=object)
    most = inputs["max_tokens"].data.astype(np.int32) if "max_tokens" in inputs else np.array([-1], np.int32)
    parameters = np.array([json.dumps(request.parameters, separators=(",", ":")).encode()], dtype=object)
    return [
        Tensor("text_output", "BYTES", words.shape, words),
        Tensor("length", "INT32", (1,), most),
        Tensor("parameters", "BYTES", (1,), parameters),
    ]


async def _count(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
    inputs = {tensor.name: tensor for tensor in request.inputs}
    wanted = int(inputs["IN"].data.flat[0])
    delay = float(inputs["DELAY"].data.flat[0]) if "DELAY" in inputs else 0.0
    for number in range(wanted if wanted >= 0 else -wanted - 1):
        out = Tensor("OUT", "INT32", (1,), np.array([number], np.int32))
        yield InferResponse(request.model, "1", request.id, outputs=[out], final=False)
        await asyncio.sleep(delay)
    if wanted < 0:
        raise ServiceError(ErrorKind.INTERNAL, OWN_ERROR)
    yield InferResponse(request.model, "1", request.id)
