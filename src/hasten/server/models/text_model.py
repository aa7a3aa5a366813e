"""The text model: text in, text out, under the names that vLLM's backend and TensorRT-LLM have.

It has no engine of its own; each request uses the token model's that serves at that time. Outputs have an entry for
each completion. When it streams, a response has what is new since the one before.
"""

import json
from contextlib import ExitStack
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError
from hasten.core.types import FinishReason
from hasten.server.by_size import by_size
from hasten.server.engine.client import CompletionDelta, EngineClient, Progress
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import Logprob
from hasten.server.models.config import is_decoupled
from hasten.server.models.model import DependentModel, Models
from hasten.server.models.text_inputs import TextRequest, read_text
from hasten.server.models.work import Outcome, Work
from hasten.server.types import ErrorKind, ServiceError, Tensor, Texts


class TextModel(DependentModel):
    """One version of a text model."""

    def __init__(self, config: model_config_pb2.ModelConfig, models: Models) -> None:
        super().__init__(config, models)
        self._decoupled = is_decoupled(config)
        if (pooling := self.token_engine().info.pooling) is not None:
            raise ConfigError(
                f"model '{config.name}': {pooling.architecture} generates no text; set parameter 'kind' to embedding "
                "or classification"
            )
        self.token_model_tokenizer()

    def execute(self, work: Work) -> "_Responses":
        """One response, or with `stream` one whenever there is more."""
        return _Responses(self, work)

    def check_stream(self, name: str) -> None:
        """ServiceError where it cannot stream; `name`: its own."""
        if not self._decoupled:
            raise ServiceError(ErrorKind.UNSUPPORTED, f"model '{name}' is not decoupled and cannot stream")


class _Responses:
    """The responses to one request; see Stream."""

    def __init__(self, model: TextModel, work: Work) -> None:
        self._model = model
        self._work = work
        self._held = ExitStack()
        self._engine: EngineClient
        self._ticket: Ticket | None = None
        self._reply: _Reply
        self._ended = False

    def __aiter__(self) -> "_Responses":
        return self

    async def __anext__(self) -> Outcome:
        if self._ended:
            raise StopAsyncIteration
        ticket = self._ticket or await self._begin()
        progress = await ticket.read()
        self._work.clock.wait(progress.queue_seconds)
        self._work.clock.compute()
        self._ended = progress.finished
        return Outcome(await by_size(progress.size, self._reply.tensors, progress), progress.finished)

    async def _begin(self) -> Ticket:
        work, served = self._work, self._model.find()
        self._held.enter_context(served.use())
        self._engine = self._model.token_engine(served)
        request = read_text(work, self._engine.info)
        if request.stream:
            self._model.check_stream(work.model)
        work.clock.prepare()
        self._reply = _Reply(request, work)
        self._ticket = await self._engine.submit(
            request.prompt,
            request.params,
            stream=request.stream,
            priority=work.priority,
            queue_timeout=work.queue_timeout,
            salt=work.cache_salt,
        )
        return self._ticket

    async def aclose(self) -> None:
        """See Stream."""
        self._ended = True
        if self._ticket is not None:
            self._engine.withdraw(self._ticket)
        self._held.close()


class _Reply:
    """Responses to one request."""

    def __init__(self, request: TextRequest, work: Work) -> None:
        self._request = request
        self._work = work
        self._last = [CompletionDelta(index, [], "") for index in range(request.params.n)]
        """What came last of each completion, without what the responses so far have."""
        self._first = request.prompt if request.prepend_input else ""
        self._prompt_tokens = 0
        names = ("text_output", *sorted(request.wanted))
        self._names = [name for name in names if name in work.outputs]

    def tensors(self, progress: Progress) -> list[Tensor]:
        """The outputs that say what is new."""
        self._prompt_tokens = self._prompt_tokens or len(progress.prompt_token_ids)
        for delta in progress.completions:
            if delta.finish_reason is FinishReason.ERROR:
                raise ServiceError(ErrorKind.INTERNAL, f"the prompt could not be continued: {delta.stop_reason}")
            self._last[delta.index] = delta
        tensors = [self._output(name, self._last) for name in self._names]
        for delta in progress.completions:
            self._last[delta.index] = replace(delta, token_ids=[], text="", logprobs=None, token_logprobs=None)
        return tensors

    def _output(self, name: str, deltas: list[CompletionDelta]) -> Tensor:
        if name == "text_output":
            return self._texts(name, [self._first + delta.text for delta in deltas])
        if name == "finish_reason":
            return self._texts(name, [str(delta.finish_reason) for delta in deltas])
        if name == "logprobs":
            texts = [_logprobs_json(delta) if self._request.logprobs else "null" for delta in deltas]
            return self._texts(name, texts)
        if name == "num_input_tokens":
            return self._work.tensor(name, "UINT32", np.array([self._prompt_tokens], np.uint32))
        if name == "num_output_tokens":
            return self._work.tensor(name, "UINT32", np.array([len(delta.token_ids) for delta in deltas], np.uint32))
        if name == "output_log_probs":
            return self._work.tensor(name, "FP32", _matrix([_chosen(delta) for delta in deltas]))
        sums = np.array([delta.cumulative_logprob or 0.0 for delta in deltas], np.float32)
        return self._work.tensor(name, "FP32", sums)

    def _texts(self, name: str, texts: list[str]) -> Tensor:
        """One for each completion."""
        shape = (1, len(texts)) if self._work.batch_size else (len(texts),)
        return Texts(name, shape, [text.encode() for text in texts])


def _matrix(rows: list[list[float]]) -> NDArray[np.float32]:
    matrix = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix


def _chosen(delta: CompletionDelta) -> list[float]:
    if delta.token_logprobs is not None:
        return delta.token_logprobs
    return [entry[token].logprob for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=False)]


def _logprobs_json(delta: CompletionDelta) -> str:
    """A list with an entry for each token; encoded one by one, so that other threads run between them."""
    positions = (
        json.dumps({token: _entry(entry) for token, entry in position.items()}) for position in delta.logprobs or ()
    )
    return f"[{', '.join(positions)}]"


def _entry(entry: Logprob) -> dict[str, Any]:
    return {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
