"""Models over an engine that generates no text: a token model, and a text model that uses its engine.

The token model has FasterTransformer's kind of tensors. Its outputs have the batch as their first axis:
output_hidden_state [batch, longest, hidden] of each token, 0 behind a text's end; output_embedding [batch, width];
output_scores [batch, labels], or [batch, longest, labels] of tokens.

The text model takes several texts and gives a row of numbers for each. `text_output` has the same numbers as JSON, as
in vLLM's backend, whose input `embedding_request` is taken too: JSON with `input`, a text or token ids, and
`pooling_params`. `text_pair` has a second text for each, which is read together with the first.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import InvalidRequestError
from hasten.core.types import PoolingParams, PoolingTask, Request
from hasten.engine.texts import instruction
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient
from hasten.server.engine.wire import EngineInfo
from hasten.server.json_size import check_json_size
from hasten.server.models.config import parameter, wrong
from hasten.server.models.interfaces import DEFAULT_MODEL_TYPE, ENCODER_DECODER_TYPE, ENCODER_TYPES, POOLING_KINDS, Kind
from hasten.server.models.model import DependentModel, EngineModel
from hasten.server.models.work import Work, decoded
from hasten.server.pooling.call import Numbers, PoolingCall, Result
from hasten.server.pooling.types import check_count
from hasten.server.types import InferResponse, Tensor

if TYPE_CHECKING:
    from hasten.server.lifecycle import Registry

_OUTPUTS: dict[str, dict[str, PoolingTask]] = {
    "bert": {"output_hidden_state": "token_embed", "output_embedding": "embed"},
    "classifier": {"output_scores": "classify"},
    "token-classifier": {"output_scores": "token_classify"},
}
"""What each output is made by, by the model's type."""


_OF_VECTORS = ("dimensions", "normalize", "truncate_prompt_tokens")
_OF_SCORES = ("activation", "truncate_prompt_tokens")
"""Parameters of a request that say what to make of its texts."""


def pooling_params(work: Work, task: PoolingTask, **values: Any) -> PoolingParams:
    """What to make of each text; ServiceError and InvalidRequestError name a parameter that is wrong or not known.

    `values` are those that came otherwise.
    """
    known = work.known_parameters(_OF_VECTORS if "embed" in task else _OF_SCORES)
    return PoolingParams(task=task, **{**known, **values})


def check_model_type(config: model_config_pb2.ModelConfig, info: EngineInfo) -> None:
    """ConfigError where the tensors of a token model are not those of the model that its engine has loaded."""
    given = parameter(config, "model_type", DEFAULT_MODEL_TYPE)
    pooling, encodes = info.pooling, info.decoder_start_token_id is not None
    if pooling is None and (given in _OUTPUTS or encodes != (given == ENCODER_DECODER_TYPE)):
        kind = "generates text" if given in _OUTPUTS else "has an encoder" if encodes else "has no encoder"
        raise wrong(
            config,
            f"parameter 'model_type' is {given!r}, but the model {kind}; set "
            f"{ENCODER_DECODER_TYPE if encodes else DEFAULT_MODEL_TYPE!r}",
        )
    if pooling is not None and given != (wanted := ENCODER_TYPES[pooling.tasks[0]]):
        raise wrong(
            config, f"parameter 'model_type' is {given!r}, but {pooling.architecture} generates no text; set {wanted!r}"
        )


class EncoderModel(EngineModel):
    """A version of a token model that makes vectors or scores."""

    def __init__(self, config: model_config_pb2.ModelConfig, engine: EngineClient) -> None:
        super().__init__(engine)
        self._outputs = _OUTPUTS[parameter(config, "model_type", DEFAULT_MODEL_TYPE)]

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """One response."""
        outputs = {name: task for name, task in self._outputs.items() if name in work.outputs}
        params = {name: pooling_params(work, task) for name, task in outputs.items()}
        size = sum(tensor.data.nbytes for tensor in work.inputs.values())
        call = PoolingCall(self.engine, work.queueing)
        found: dict[str, list[Result]] = {}
        for name, each in params.items():
            requests = await by_size(size, self._requests, work, each)
            work.clock.prepare()
            found[name] = await call.results(requests, each)
            work.clock.wait(max(result.queue_seconds for result in found[name]))
        work.clock.compute()
        yield work.response([await _tensor(name, results) for name, results in found.items()], final=True)

    def _requests(self, work: Work, params: PoolingParams) -> list[Request]:
        """A request of each item; InvalidRequestError names the item and the input that is wrong."""
        ids, types = work.inputs["input_ids"].data, work.inputs.get("token_type_ids")
        lengths = work.inputs["sequence_lengths"].data.reshape(work.batch_size, -1)
        if lengths.shape[1] != 1:
            raise _wrong(0, "sequence_lengths", f"has {lengths.shape[1]} values, but an item has one")
        if types is not None and types.data.shape != ids.shape:
            raise _wrong(0, "token_type_ids", f"has shape {list(types.data.shape)}, but 'input_ids' {list(ids.shape)}")
        requests = []
        for index, (length,) in enumerate(lengths.tolist()):
            if not 0 < length <= ids.shape[1]:
                raise _wrong(index, "sequence_lengths", f"is {length}; it must be from 1 to {ids.shape[1]}")
            row: list[int] = ids[index, :length].tolist()
            kinds: list[int] = [] if types is None else types.data[index, :length].tolist()
            self._check(index, row)
            requests.append(
                Request(
                    request_id="",
                    prompt_token_ids=tuple(row),
                    pooling=params,
                    token_type_ids=tuple(kinds) if any(kinds) else (),
                )
            )
        return requests

    def _check(self, index: int, row: Sequence[int]) -> None:
        info = self.engine.info
        if len(row) > (most := self.engine.most_prompt_tokens):
            raise _wrong(index, "input_ids", f"has {len(row)} tokens; the model takes at most {most}")
        if max(row) >= info.vocab_size:
            raise _wrong(index, "input_ids", f"has token id {max(row)}; the vocabulary ends at {info.vocab_size - 1}")


def _wrong(index: int, name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"item {index} of the batch: input '{name}' {problem}")


async def _tensor(name: str, results: Sequence[Result]) -> Tensor:
    arrays = [result.numbers for result in results]
    data: np.ndarray[Any, Any] = await by_size(sum(array.nbytes for array in arrays), padded, arrays)
    return Tensor.of(name, "FP32", data)


def padded(arrays: Sequence[Numbers]) -> Numbers:
    """Arrays of one or two axes under each other, with zeros behind those whose first axis is shorter."""
    if arrays[0].ndim == 1:
        return np.stack(arrays)
    result = np.zeros((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), np.float32)
    for row, array in zip(result, arrays, strict=True):
        row[: len(array)] = array
    return result


_encode = msgspec.json.Encoder().encode
_NUMBER_BYTES = 20


class _VllmParams(msgspec.Struct, forbid_unknown_fields=True):
    dimensions: int | list[int] | None = None


class _VllmRequest(msgspec.Struct, forbid_unknown_fields=True):
    input: str | list[int]
    pooling_params: _VllmParams = msgspec.field(default_factory=_VllmParams)


_VLLM = msgspec.json.Decoder(_VllmRequest)


class PooledTextModel(DependentModel):
    """One version of a text model that makes vectors or scores."""

    def __init__(self, config: model_config_pb2.ModelConfig, kind: Kind, models: "Registry") -> None:
        super().__init__(config, models)
        self._task = POOLING_KINDS[kind]
        pooling = self.token_engine().info.pooling
        if pooling is None or self._task not in pooling.tasks:
            does = "generates text" if pooling is None else f"does {', '.join(pooling.tasks)}"
            raise wrong(config, f"parameter 'kind' is {kind.value!r}, but the model {does}")
        self.token_model_tokenizer()

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """One response."""
        served = self.find()
        with served:
            call = PoolingCall(self.token_engine(served), work.queueing)
            results = await self._results(call, work)
            work.clock.wait(max(result.queue_seconds for result in results))
            work.clock.compute()
            size = _NUMBER_BYTES * sum(result.numbers.size for result in results)
            yield work.response(await by_size(size, self._tensors, results, work), final=True)

    async def _results(self, call: PoolingCall, work: Work) -> list[Result]:
        request = _vllm_request(work)
        if request is not None:
            dimensions = request.pooling_params.dimensions
            size = dimensions[0] if isinstance(dimensions, list) and dimensions else dimensions or None
            work.clock.prepare()
            params = pooling_params(work, self._task, dimensions=size)
            return await call.prompts([request.input], params)
        texts = _texts(work, "text_input")
        check_count("input 'text_input'", len(texts))
        params = pooling_params(work, self._task)
        work.clock.prepare()
        if "text_pair" in work.inputs:
            seconds = _texts(work, "text_pair")
            if len(seconds) != len(texts):
                raise InvalidRequestError(
                    f"input 'text_pair' has {len(seconds)} texts, but 'text_input' {len(texts)}; give one for each"
                )
            pairs = list(zip(texts, seconds, strict=True))
            return await call.pairs(pairs, params, "text_input")
        before = instruction(call.info.texts, None, None) if self._task == "embed" else None
        return await call.prompts(texts, params, before)

    def _tensors(self, results: Sequence[Result], work: Work) -> list[Tensor]:
        rows = padded([result.numbers for result in results])
        texts = np.empty(len(results), dtype=object)
        if "text_output" in work.outputs:
            texts[:] = [_encode(result.numbers.tolist()) for result in results]
        name = "embedding" if self._task == "embed" else "scores"
        tensors = [work.tensor("text_output", "BYTES", texts), work.tensor(name, "FP32", rows)]
        counts = np.array([len(result.prompt_token_ids) for result in results], np.uint32)
        for name, count in (("num_input_tokens", counts), ("num_output_tokens", np.zeros_like(counts))):
            if work.flag(f"return_{name}"):
                tensors.append(work.tensor(name, "UINT32", count))
        return [tensor for tensor in tensors if tensor.name in work.outputs]


def _vllm_request(work: Work) -> _VllmRequest | None:
    """What `embedding_request` asks for; None where it is not given. InvalidRequestError says what is wrong."""
    given = work.inputs.get("embedding_request")
    if (given is None) == ("text_input" not in work.inputs):
        raise InvalidRequestError("give either input 'text_input' or input 'embedding_request'")
    if given is None:
        return None
    body = bytes(given.data.ravel()[0])
    check_json_size(body)
    try:
        return _VLLM.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"input 'embedding_request' is not what it should be: {error}") from None


def _texts(work: Work, name: str) -> list[str]:
    return [decoded(text, name) for text in work.inputs[name].data.ravel().tolist()]
