"""The text model over a token model that makes vectors or scores: several texts in, a row of numbers for each out.

`text_output` has the same numbers as JSON, as in vLLM's backend, whose input `embedding_request` is taken too: JSON
with `input`, a text or token ids, and `pooling_params`. `text_pair` has a second text for each, which is read together
with the first.
"""

from collections.abc import AsyncGenerator, Sequence

import msgspec
import numpy as np
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.engine.texts import instruction
from hasten.server.by_size import by_size
from hasten.server.json_size import check_json_size
from hasten.server.models.encoder_model import padded, pooling_params
from hasten.server.models.interfaces import POOLING_KINDS, Kind
from hasten.server.models.model import DependentModel, Models
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


class PooledTextModel(DependentModel):
    """One version of a text model that makes vectors or scores."""

    def __init__(self, config: model_config_pb2.ModelConfig, kind: Kind, models: Models) -> None:
        super().__init__(config, models)
        self._task = POOLING_KINDS[kind]
        pooling = self.token_engine().info.pooling
        if pooling is None or self._task not in pooling.tasks:
            does = "generates text" if pooling is None else f"does {', '.join(pooling.tasks)}"
            raise ConfigError(f"model '{config.name}': parameter 'kind' is {kind.value!r}, but the model {does}")
        self.token_model_tokenizer()

    async def execute(self, work: Work) -> AsyncGenerator[Outcome, None]:
        """One response."""
        served = self.find()
        with served.use():
            call = PoolingCall(self.token_engine(served), priority=work.priority, queue_timeout=work.queue_timeout)
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
    try:
        return [bytes(text).decode() for text in work.inputs[name].data.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input '{name}' is not UTF-8: {error}") from None
