"""What is counted of each version of a model: Triton's statistics, and what only language models have."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from tritonclient.grpc import service_pb2

from hasten.core.errors import EngineError, HastenError
from hasten.server.engine.counters import LanguageCounters
from hasten.server.engine.queue import QueueError
from hasten.server.exposition import Histogram
from hasten.server.models.work import Work


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


@dataclass
class Duration:
    """Times that something took."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one that took `ns` nanoseconds."""
        self.count += 1
        self.ns += max(0, ns)

    @property
    def us(self) -> int:
        """In microseconds."""
        return self.ns // 1000

    def message(self) -> service_pb2.StatisticDuration:
        """As the protocol has it."""
        return service_pb2.StatisticDuration(count=self.count, ns=self.ns)


@dataclass
class Compute:
    """The three parts of computing a request."""

    input: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)

    def add(self, work: Work, end: int) -> None:
        """Count a request that ended at `end`."""
        clock = work.clock
        prepared = clock.prepared or end
        computed = clock.computed or end
        self.input.add(prepared - clock.begun)
        self.infer.add(computed - prepared - clock.queued)
        self.output.add(end - computed)

    def messages(self) -> dict[str, service_pb2.StatisticDuration]:
        """As the protocol has them."""
        return {
            "compute_input": self.input.message(),
            "compute_infer": self.infer.message(),
            "compute_output": self.output.message(),
        }


@dataclass
class ModelCounters:
    """Of one version of a model, since the server's start: loading it again does not set them back."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute: Compute = field(default_factory=Compute)
    failures: dict[FailureReason, int] = field(default_factory=lambda: dict.fromkeys(FailureReason, 0))
    inference_count: int = 0
    """Items of all batches."""
    execution_count: int = 0
    """Requests: the engine batches them anew at every step."""
    last_inference_ms: int = 0
    """Since 1970."""
    pending: int = 0
    """Requests under way that have no response yet."""
    batches: dict[int, Compute] = field(default_factory=dict)
    """By the batch size of the request."""
    first_response_ms: Histogram = field(default_factory=lambda: Histogram(_FIRST_RESPONSE_MS))
    """Of a decoupled model."""
    load_seconds: float = 0.0
    language: LanguageCounters | None = None
    """Of the engines of a model that owns some."""

    def track(self, work: Work) -> "Tracked":
        """Count a request from now on, until it has succeeded or failed."""
        return Tracked(self, work)

    def message(self, model: str, version: str) -> service_pb2.ModelStatistics:
        """As the protocol has it."""
        nothing = service_pb2.StatisticDuration()
        return service_pb2.ModelStatistics(
            name=model,
            version=version,
            last_inference=self.last_inference_ms,
            inference_count=self.inference_count,
            execution_count=self.execution_count,
            inference_stats=service_pb2.InferStatistics(
                success=self.success.message(),
                fail=self.fail.message(),
                queue=self.queue.message(),
                cache_hit=nothing,
                cache_miss=nothing,
                **self.compute.messages(),
            ),
            batch_stats=[
                service_pb2.InferBatchStatistics(batch_size=size, **compute.messages())
                for size, compute in sorted(self.batches.items())
            ],
        )


class Tracked:
    """A request under way. What it has come to first counts: a client may leave with the last response."""

    def __init__(self, counters: ModelCounters, work: Work) -> None:
        self._counters = counters
        self._work = work
        self._responded = self._ended = False
        counters.pending += 1

    def respond(self, *, decoupled: bool = False) -> None:
        """There is a response, or there will be none."""
        if self._responded:
            return
        self._responded = True
        self._counters.pending -= 1
        if decoupled:
            self._counters.first_response_ms.observe((time.monotonic_ns() - self._work.clock.begun) / 1e6)

    def fail(self, error: BaseException) -> None:
        """It ends with an error."""
        self.respond()
        if not self._ended:
            self._ended = True
            self._counters.fail.add(time.monotonic_ns() - self._work.clock.begun)
            self._counters.failures[_reason(error)] += 1

    def succeed(self) -> None:
        """It ends with its last response."""
        self.respond()
        if self._ended:
            return
        self._ended = True
        counters, work = self._counters, self._work
        end, items = time.monotonic_ns(), max(1, work.batch_size)
        counters.success.add(end - work.clock.begun)
        counters.queue.add(work.clock.queued)
        counters.compute.add(work, end)
        counters.batches.setdefault(items, Compute()).add(work, end)
        counters.inference_count += items
        counters.execution_count += 1
        counters.last_inference_ms = time.time_ns() // 1_000_000


def _reason(error: BaseException) -> FailureReason:
    cause = error.__cause__ if error.__cause__ is not None else error
    if isinstance(cause, QueueError):
        return FailureReason.REJECTED
    if isinstance(cause, EngineError):
        return FailureReason.BACKEND
    return FailureReason.OTHER if isinstance(cause, HastenError | Exception) else FailureReason.CANCELED


class Counters:
    """Of all models, by name and version."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], ModelCounters] = {}

    def of(self, model: str, version: str) -> ModelCounters:
        """Those of one version; they are there from its first loading on."""
        key = (model, version)
        if key not in self._models:
            self._models[key] = ModelCounters()
        return self._models[key]

    def all(self) -> Mapping[tuple[str, str], ModelCounters]:
        """Of every version that was ever loaded."""
        return dict(sorted(self._models.items()))
