"""The token model: FasterTransformer's tensors in front of an engine of its own.

The items of a batch are requests of their own to the engine, so how long one is or takes is nothing to the others. A
decoupled model sends with each response all that there is so far.

Outputs are filled as tokens come. output_ids [batch, beam, longest]: prompt and generated tokens, of an encoder-decoder
generated ones alone, then the item's end_id. sequence_length, of these tokens, and response_input_lengths [batch,
beam]. cum_log_probs [batch, beam] and output_log_probs [batch, beam, most generated], 0 behind the end, where log-
probabilities are asked for.
"""

from collections.abc import AsyncGenerator, Callable, Sequence, Set
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from hasten.core.types import FinishReason
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient
from hasten.server.engine.group import RequestGroup
from hasten.server.engine.ticket import Progress
from hasten.server.engine.wire import CompletionDelta
from hasten.server.models.config import interface_of, is_decoupled, parameter
from hasten.server.models.interfaces import DEFAULT_MODEL_TYPE, ENCODER_DECODER_TYPE, INPUT_NAMES, Kind
from hasten.server.models.model import EngineModel
from hasten.server.models.token_inputs import TokenRequest, read_items
from hasten.server.models.work import Work
from hasten.server.types import ErrorKind, InferResponse, ServiceError, Tensor

_ROOM = 64
"""Tokens behind the longest prompt that there is memory for at first; doubled as often as need be."""


def _behind(rows: NDArray[Any], lengths: NDArray[Any], filler: NDArray[Any]) -> NDArray[Any]:
    """Rows [batch, beam, any] up to the longest of them, filled behind each one's own length."""
    longest = int(lengths.max())
    rows = rows[:, :, :longest]
    return rows if lengths.size == 1 else np.where(np.arange(longest) < lengths[:, :, np.newaxis], rows, filler)


class BatchOutput:
    """What has become of a batch so far. Arrays only ever grow behind what there was."""

    def __init__(self, request: TokenRequest, *, with_prompts: bool = True) -> None:
        """`with_prompts`: whether outputs begin with their prompts."""
        self._request = request
        beams = (len(request.items), request.beam_width)
        prompts = [item.prompt if with_prompts else [] for item in request.items]
        lengths = np.array(list(map(len, prompts)), np.int32)
        self._prompt_lengths = np.repeat(lengths[:, np.newaxis], request.beam_width, axis=1)
        self._lengths = self._prompt_lengths.astype(np.uint32)
        self._ids = np.zeros((*beams, max(map(len, prompts)) + _ROOM), np.uint32)
        for row, prompt in zip(self._ids, prompts, strict=True):
            row[:, : len(prompt)] = prompt
        self._cumulative = np.zeros(beams)
        self._log_probs = np.zeros((*beams, _ROOM), np.float32)

    def take(self, item: int, delta: CompletionDelta) -> None:
        """Add what is new of one beam of an item; ServiceError if it cannot be continued."""
        if delta.finish_reason is FinishReason.ERROR:
            raise ServiceError(ErrorKind.INTERNAL, f"the prompt could not be continued: {delta.stop_reason}")
        beam = item, delta.index
        begin = int(self._lengths[beam])
        end = begin + len(delta.token_ids)
        self._ids = _with_room(self._ids, end)
        self._ids[beam][begin:end] = delta.token_ids
        if delta.cumulative_logprob is not None:
            self._cumulative[beam] = delta.cumulative_logprob
        if delta.logprobs is not None:
            pairs = zip(delta.token_ids, delta.logprobs, strict=True)
            self._add_log_probs(beam, begin, [entry[token].logprob for token, entry in pairs])
        if delta.token_logprobs is not None and self._request.log_probs:
            self._add_log_probs(beam, begin, delta.token_logprobs)
        self._lengths[beam] = end

    def _add_log_probs(self, beam: tuple[int, int], begin: int, log_probs: Sequence[float]) -> None:
        at = begin - int(self._prompt_lengths[beam])
        self._log_probs = _with_room(self._log_probs, at + len(log_probs))
        self._log_probs[beam][at : at + len(log_probs)] = log_probs

    @property
    def nbytes(self) -> int:
        """Of its largest tensor, with the room behind it."""
        return self._ids.nbytes

    def tensors(self, names: Set[str]) -> Callable[[], list[Tensor]]:
        """What makes the outputs with these names as of now, also while further tokens are added behind them."""
        request, prompt_lengths, ids, log_probs = self._request, self._prompt_lengths, self._ids, self._log_probs
        lengths, cumulative = self._lengths.copy(), self._cumulative.astype(np.float32)

        def build() -> list[Tensor]:
            end_ids = np.array([item.end_id for item in request.items], np.uint32)
            tensors = [
                Tensor.of("output_ids", "UINT32", _behind(ids, lengths, end_ids[:, np.newaxis, np.newaxis])),
                Tensor.of("sequence_length", "UINT32", lengths),
                Tensor.of("response_input_lengths", "INT32", prompt_lengths),
            ]
            if request.log_probs:
                generated = _behind(log_probs, lengths - prompt_lengths, np.zeros((), np.float32))
                tensors.append(Tensor.of("cum_log_probs", "FP32", cumulative))
                tensors.append(Tensor.of("output_log_probs", "FP32", generated))
            return [tensor for tensor in tensors if tensor.name in names]

        return build


def _with_room(rows: NDArray[Any], length: int) -> NDArray[Any]:
    """Rows of at least this length: the same, or a copy of twice the length."""
    if rows.shape[2] >= length:
        return rows
    grown = np.zeros((*rows.shape[:2], max(length, 2 * rows.shape[2])), rows.dtype)
    grown[:, :, : rows.shape[2]] = rows
    return grown


_ITEM_BYTES = 1024
"""Of its tensors: what reading an item costs, in bytes of copying (about 50 us)."""


class TokenModel(EngineModel):
    """A version of a token model."""

    def __init__(self, config: model_config_pb2.ModelConfig, engine: EngineClient) -> None:
        super().__init__(engine)
        self._decoupled = is_decoupled(config)
        model_type = parameter(config, "model_type", DEFAULT_MODEL_TYPE)
        self._names = INPUT_NAMES.get(model_type, {})
        self._datatypes = {rule.name: rule.datatype for rule in interface_of(config, Kind.TOKEN).outputs}
        self._with_prompts = model_type != ENCODER_DECODER_TYPE

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """One response, or if decoupled one whenever there is more."""
        size = sum(tensor.data.nbytes for tensor in work.inputs.values()) + _ITEM_BYTES * work.batch_size
        request, output = await by_size(size, self._read, work)
        work.clock.prepare()
        submit = partial(self.engine.submit, queueing=work.queueing, stream=self._decoupled)
        with closing(RequestGroup(self.engine)) as requests:
            await requests.submit([partial(submit, item.prompt, item.params) for item in request.items])
            while requests.unfinished:
                news: tuple[int, Progress] | None = await requests.read()
                while news is not None:  # all that came while the last response was made is one response
                    index, progress = news
                    work.clock.wait(progress.queue_seconds)
                    for delta in progress.completions:
                        output.take(index, delta)
                    news = requests.take()
                if self._decoupled or not requests.unfinished:
                    work.clock.compute()
                    yield await self._response(output, work, final=not requests.unfinished)

    def _read(self, work: Work) -> tuple[TokenRequest, BatchOutput]:
        request = read_items(work, self.engine.info, self._names)
        return request, BatchOutput(request, with_prompts=self._with_prompts)

    async def _response(self, output: BatchOutput, work: Work, *, final: bool) -> InferResponse:
        tensors = await by_size(output.nbytes, output.tensors(work.outputs))
        return work.response([self._typed(tensor) for tensor in tensors], final)

    def _typed(self, tensor: Tensor) -> Tensor:
        """A tensor in the data type that this backend gives it: token ids and lengths are signed in some."""
        datatype = self._datatypes.get(tensor.name, tensor.datatype)
        if datatype == tensor.datatype:
            return tensor
        return Tensor.of(tensor.name, datatype, tensor.data.view(np.int32))
