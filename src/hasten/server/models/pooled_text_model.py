"""The text model over a token model that makes vectors or scores: several texts in, a row of numbers for each out.

`text_output` has the same numbers as JSON, as in vLLM's backend, whose input `embedding_request` is taken too: JSON
with `input`, a text or token ids, and `pooling_params`. `text_pair` has a second text for each, which is read together
with the first.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.engine.texts import instruction
from hasten.server.by_size import by_size
from hasten.server.json_size import check_json_size
from hasten.server.models.config import parameter
from hasten.server.models.encoder_model import padded
from hasten.server.models.interfaces import POOLING_KINDS, Kind
from hasten.server.models.model import Models, required_engine
from hasten.server.models.parameters import TOKEN_MODEL
from hasten.server.models.pooling_parameters import pooling_params
from hasten.server.models.text_model import DEFAULT_TOKEN_MODEL
from hasten.server.models.work import Outcome, Work
from hasten.server.pooling.call import PoolingCall, Result
from hasten.server.pooling.texts import TextReader
from hasten.server.pooling.types import check_count
from hasten.server.types import Tensor

_encode = msgspec.json.Encoder().encode
_NUMBER_BYTES = 20


class _VllmParams(msgspec.Struct, forbid_unknown_fields=True):
    dimensions: int | list[int] | None = None


class _VllmRequest(msgspec.Struct, forbid_unknown_fields=True):
    input: str | list[int]
    pooling_params: _VllmParams = msgspec.field(default_factory=_VllmParams)


_VLLM = msgspec.json.Decoder(_VllmRequest)


class PooledTextModel:
    """One version of a text model that makes vectors or scores."""

    engine = None

    def __init__(self, config: model_config_pb2.ModelConfig, kind: Kind, models: Models) -> None:
        self._task = POOLING_KINDS[kind]
        self._token_model = parameter(config, TOKEN_MODEL, DEFAULT_TOKEN_MODEL)
        self._models = models
        engine = required_engine(models.find(self._token_model))
        pooling = engine.info.pooling
        if pooling is None or self._task not in pooling.tasks:
            does = "generates text" if pooling is None else f"does {', '.join(pooling.tasks)}"
            raise ConfigError(f"model '{config.name}': parameter 'kind' is {kind.value!r}, but the model {does}")
        if engine.tokenizer is None:
            raise ConfigError(f"model '{self._token_model}' has no tokenizer; set its parameter 'tokenizer_path'")

    @property
    def ready(self) -> bool:
        """Whether the token model is."""
        return self._models.find(self._token_model).model.ready

    async def execute(self, work: Work) -> AsyncGenerator[Outcome, None]:
        """One response."""
        served = self._models.find(self._token_model)
        with served.use():
            engine = required_engine(served)
            call = PoolingCall(engine, priority=work.priority, queue_timeout=work.queue_timeout)
            results = await self._results(call, work)
            work.clock.wait(max(result.queue_seconds for result in results))
            work.clock.compute()
            size = _NUMBER_BYTES * sum(result.numbers.size for result in results)
            yield Outcome(await by_size(size, self._tensors, results, work), final=True)

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
            return await call.results(await TextReader(call.client, params, "text_input").pairs(pairs), params)
        before = instruction(call.info.texts, None, None) if self._task == "embed" else None
        return await call.prompts(texts, params, before)

    def _tensors(self, results: Sequence[Result], work: Work) -> list[Tensor]:
        rows = padded([result.numbers for result in results])
        texts = np.empty(len(results), dtype=object)
        if "text_output" in work.outputs:
            texts[:] = [_encode(result.numbers.tolist()) for result in results]
        name = "embedding" if self._task == "embed" else "scores"
        tensors = [_tensor("text_output", "BYTES", texts, work), _tensor(name, "FP32", rows, work)]
        counts = np.array([len(result.prompt_token_ids) for result in results], np.uint32)
        for name, count in (("num_input_tokens", counts), ("num_output_tokens", np.zeros_like(counts))):
            if _flag(work, f"return_{name}"):
                tensors.append(_tensor(name, "UINT32", count, work))
        return [tensor for tensor in tensors if tensor.name in work.outputs]

    async def close(self, timeout: float) -> None:
        """It holds nothing."""


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
    try:
        return [bytes(text).decode() for text in work.inputs[name].data.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input '{name}' is not UTF-8: {error}") from None


def _flag(work: Work, name: str) -> bool:
    return name in work.inputs and bool(work.inputs[name].data.ravel()[0])


def _tensor(name: str, datatype: str, data: NDArray[Any], work: Work) -> Tensor:
    """With a batch axis of 1 if the inputs have one."""
    data = data[np.newaxis] if work.batch_size else data
    return Tensor(name, datatype, data.shape, data)
