"""What is counted of each version of a model: Triton's statistics, and what only language models have."""

import time
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2

from hasten.core.errors import EngineError, HastenError
from hasten.server.engine.counters import LanguageCounters
from hasten.server.engine.queue import QueueError
from hasten.server.exposition import Histogram
from hasten.server.models.work import Clock

if TYPE_CHECKING:
    from hasten.server.engine.ticket import Progress


class FailureReason(Enum):
    """Why a request failed, as Triton's metrics tell it apart."""

    REJECTED = "REJECTED"
    """The queue was full, or it waited, or would have waited, for too long."""
    CANCELED = "CANCELED"
    """The client left."""
    BACKEND = "BACKEND"
    """The engine failed."""
    OTHER = "OTHER"


_FIRST_RESPONSE_MS = (100.0, 500.0, 2000.0, 5000.0)


class Durations:
    """How often requests, or parts of them, took how long in all, by the protocol's names of these."""

    def __init__(self, kind: Any) -> None:
        """`kind`: the protocol's message of them."""
        self.counts = {field.name: 0 for field in kind.DESCRIPTOR.fields if field.message_type is not None}
        self.ns = dict(self.counts)

    def add(self, name: str, ns: int) -> None:
        """Count one that took `ns` nanoseconds."""
        self.counts[name] += 1
        self.ns[name] += max(0, ns)

    def us(self, name: str) -> int:
        """All time of one, in microseconds."""
        return self.ns[name] // 1000

    def messages(self) -> dict[str, Any]:
        """As the protocol has them."""
        return {name: {"count": count, "ns": self.ns[name]} for name, count in self.counts.items()}


class ModelCounters:
    """Of one version of a model, since the server's start: loading it again does not set them back."""

    def __init__(self, model: str = "", version: str = "") -> None:
        self._model, self._version = model, version
        self.durations = Durations(service_pb2.InferStatistics)
        self.batches: dict[int, Durations] = {}
        """By the batch size of the request."""
        self.inference_count = 0
        """Items of all batches."""
        self.execution_count = 0
        """Requests: the engine batches them anew at every step."""
        self.last_inference_ms = 0
        """Since 1970."""
        self.failures = dict.fromkeys(FailureReason, 0)
        self.pending = 0
        """Requests under way that have no response yet."""
        self.first_response_ms = Histogram(_FIRST_RESPONSE_MS)
        """Of a decoupled model."""
        self.load_seconds = 0.0
        self.language: LanguageCounters | None = None
        """Of the engines of a model that owns some."""

    def message(self) -> service_pb2.ModelStatistics:
        """As the protocol has it."""
        return service_pb2.ModelStatistics(
            name=self._model,
            version=self._version,
            last_inference=self.last_inference_ms,
            inference_count=self.inference_count,
            execution_count=self.execution_count,
            inference_stats=self.durations.messages(),
            batch_stats=[{"batch_size": size, **batch.messages()} for size, batch in sorted(self.batches.items())],
        )


class Tally:
    """Counts a request, from now on until it has succeeded or failed, as those of all transports and APIs are counted.

    What it has come to first counts: a client may leave with the last response.
    """

    def __init__(
        self,
        counters: ModelCounters,
        clock: Clock,
        items: int,
        *,
        decoupled: bool,
        using: AbstractContextManager[None] | None = None,
    ) -> None:
        """`items`: its batch size. `using` is held until it is closed."""
        self._counters = counters
        self._clock = clock
        self._items = max(1, items)
        self._decoupled = decoupled
        self._using = using or nullcontext()
        self._using.__enter__()
        self._responded = self._ended = False
        counters.pending += 1

    def respond(self) -> None:
        """There is a response, or there will be none."""
        if self._responded:
            return
        self._responded = True
        self._counters.pending -= 1
        if self._decoupled:
            self._counters.first_response_ms.observe((time.monotonic_ns() - self._clock.begun) / 1e6)

    def take(self, progress: "Progress", *, last: bool) -> None:
        """Something is new of an item that an engine computes; `last`: all items have ended."""
        if progress.queue_seconds is not None:
            self._clock.wait(progress.queue_seconds)
            self.respond()
        if progress.finished:
            self._clock.compute()
        if last:
            self.succeed()

    def fail(self, error: BaseException) -> None:
        """It ends with an error."""
        self._counters.pending -= not self._responded
        self._responded = True
        if not self._ended:
            self._ended = True
            self._counters.durations.add("fail", time.monotonic_ns() - self._clock.begun)
            self._counters.failures[_reason(error)] += 1

    def succeed(self) -> None:
        """It ends with its last response."""
        self.respond()
        if self._ended:
            return
        self._ended = True
        counters, clock, end = self._counters, self._clock, time.monotonic_ns()
        prepared, computed = clock.prepared or end, clock.computed or end
        if (batch := counters.batches.get(self._items)) is None:
            batch = counters.batches[self._items] = Durations(service_pb2.InferBatchStatistics)
        counters.durations.add("success", end - clock.begun)
        counters.durations.add("queue", clock.queued)
        for durations in (counters.durations, batch):
            durations.add("compute_input", prepared - clock.begun)
            durations.add("compute_infer", computed - prepared - clock.queued)
            durations.add("compute_output", end - computed)
        counters.inference_count += self._items
        counters.execution_count += 1
        counters.last_inference_ms = time.time_ns() // 1_000_000

    def close(self) -> None:
        """Nobody waits for it any more: it was withdrawn unless it has ended."""
        self.fail(GeneratorExit())
        self._using.__exit__(None, None, None)


def _reason(error: BaseException) -> FailureReason:
    cause = error.__cause__ if error.__cause__ is not None else error
    if isinstance(cause, QueueError):
        return FailureReason.REJECTED
    if isinstance(cause, EngineError):
        return FailureReason.BACKEND
    return FailureReason.OTHER if isinstance(cause, HastenError | Exception) else FailureReason.CANCELED


class Counters(dict[tuple[str, str], ModelCounters]):
    """Of all models, by name and version; they are there from the first loading on."""

    def __missing__(self, key: tuple[str, str]) -> ModelCounters:
        return self.setdefault(key, ModelCounters(*key))
