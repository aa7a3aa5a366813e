"""The text model: text in, text out, under the names that vLLM's backend and TensorRT-LLM have.

It has no engine of its own; each request uses the token model's that serves at that time. Outputs have an entry for
each completion. When it streams, a response has what is new since the one before.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError
from hasten.core.types import FinishReason
from hasten.server.by_size import by_size
from hasten.server.engine.client import CompletionDelta, Progress
from hasten.server.engine.wire import Logprob
from hasten.server.models.config import is_decoupled, parameter
from hasten.server.models.model import Models, required_engine
from hasten.server.models.parameters import TOKEN_MODEL
from hasten.server.models.text_inputs import TextRequest, read_text
from hasten.server.models.work import Outcome, Work
from hasten.server.types import ErrorKind, ServiceError, Tensor

DEFAULT_TOKEN_MODEL = "fastertransformer"


class TextModel:
    """One version of a text model."""

    engine = None
    language = None

    def __init__(self, config: model_config_pb2.ModelConfig, models: Models) -> None:
        self._decoupled = is_decoupled(config)
        self._token_model = parameter(config, TOKEN_MODEL, DEFAULT_TOKEN_MODEL)
        self._models = models
        if required_engine(models.find(self._token_model)).tokenizer is None:
            raise ConfigError(f"model '{self._token_model}' has no tokenizer; set its parameter 'tokenizer_path'")

    @property
    def ready(self) -> bool:
        """Whether the token model is."""
        return self._models.find(self._token_model).model.ready

    async def execute(self, work: Work) -> AsyncGenerator[Outcome, None]:
        """One response, or with `stream` one whenever there is more."""
        served = self._models.find(self._token_model)
        with served.use():
            engine, language = required_engine(served), served.model.language
            assert language is not None, "it counts what its engine does"
            asked = read_text(work, engine.info)
            if asked.stream and not self._decoupled:
                raise ServiceError(ErrorKind.UNSUPPORTED, f"model '{work.model}' is not decoupled and cannot stream")
            work.clock.prepare()
            reply = _Reply(asked, work)
            progresses = language.measured(
                engine.generate(
                    asked.prompt,
                    asked.params,
                    stream=asked.stream,
                    priority=work.priority,
                    queue_timeout=work.queue_timeout,
                ),
                stream=asked.stream,
            )
            async with aclosing(progresses):
                async for progress in progresses:
                    work.clock.wait(progress.queue_seconds)
                    work.clock.compute()
                    yield Outcome(await by_size(progress.size, reply.tensors, progress), progress.finished)

    async def close(self, timeout: float) -> None:
        """It holds nothing."""


class _Reply:
    """Responses to one request."""

    def __init__(self, asked: TextRequest, work: Work) -> None:
        self._asked = asked
        self._work = work
        self._last = [CompletionDelta(index, [], "") for index in range(asked.params.n)]
        """What came last of each completion."""
        self._prompt_tokens = 0

    def tensors(self, progress: Progress) -> list[Tensor]:
        """The outputs that say what is new."""
        self._prompt_tokens = self._prompt_tokens or len(progress.prompt_token_ids)
        new = {delta.index: delta for delta in progress.completions}
        for delta in progress.completions:
            if delta.finish_reason is FinishReason.ERROR:
                raise ServiceError(ErrorKind.INTERNAL, f"the prompt could not be continued: {delta.stop_reason}")
            self._last[delta.index] = delta
        deltas = [
            last if index in new else replace(last, token_ids=[], text="", logprobs=None)
            for index, last in enumerate(self._last)
        ]
        made = [self._tensor("text_output", "BYTES", self._texts(deltas))]
        made += [self._extra(name, deltas) for name in sorted(self._asked.wanted) if self._has(name)]
        return [tensor for tensor in made if tensor.name in self._work.outputs]

    def _has(self, name: str) -> bool:
        """Of beams there is only the sum of the log-probabilities."""
        return name != "output_log_probs" or self._asked.params.beam_width == 1

    def _texts(self, deltas: list[CompletionDelta]) -> NDArray[Any]:
        first = self._asked.prompt if self._asked.prepend_input else ""
        return _strings([first + delta.text for delta in deltas])

    def _extra(self, name: str, deltas: list[CompletionDelta]) -> Tensor:
        if name == "finish_reason":
            return self._tensor(name, "BYTES", _strings([str(delta.finish_reason) for delta in deltas]))
        if name == "logprobs":
            texts = [_logprobs_json(delta) if self._asked.logprobs else "null" for delta in deltas]
            return self._tensor(name, "BYTES", _strings(texts))
        if name == "num_input_tokens":
            return self._tensor(name, "UINT32", np.array([self._prompt_tokens], np.uint32))
        if name == "num_output_tokens":
            return self._tensor(name, "UINT32", np.array([len(delta.token_ids) for delta in deltas], np.uint32))
        if name == "output_log_probs":
            return self._tensor(name, "FP32", _matrix([_chosen(delta) for delta in deltas]))
        sums = np.array([delta.cumulative_logprob or 0.0 for delta in deltas], np.float32)
        return self._tensor(name, "FP32", sums)

    def _tensor(self, name: str, datatype: str, data: NDArray[Any]) -> Tensor:
        """With a batch axis of 1 if the inputs have one."""
        data = data[np.newaxis] if self._work.batch_size else data
        return Tensor(name, datatype, data.shape, data)


def _strings(texts: list[str]) -> NDArray[Any]:
    made = np.empty(len(texts), dtype=object)
    made[:] = [text.encode() for text in texts]
    return made


def _matrix(rows: list[list[float]]) -> NDArray[np.float32]:
    made = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for place, row in enumerate(rows):
        made[place, : len(row)] = row
    return made


def _chosen(delta: CompletionDelta) -> list[float]:
    return [entry[token].logprob for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=False)]


def _logprobs_json(delta: CompletionDelta) -> str:
    """A list with an entry for each token; encoded one by one, so that other threads run between them."""
    positions = (
        json.dumps({token: _entry(entry) for token, entry in position.items()}) for position in delta.logprobs or ()
    )
    return f"[{', '.join(positions)}]"


def _entry(entry: Logprob) -> dict[str, Any]:
    return {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
