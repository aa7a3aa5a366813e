"""What a model gets, a request that fits its configuration, and what it gives back."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from hasten.server.types import ErrorKind, Parameter, ServiceError, Tensor


@dataclass
class Clock:
    """When the parts of a request's work ended, in ns of `time.monotonic_ns`."""

    begun: int = field(default_factory=time.monotonic_ns)
    prepared: int = 0
    """Its inputs were read."""
    computed: int = 0
    """There was a result to make outputs of."""
    queued: int = 0
    """ns that it waited for its turn, after it was prepared."""

    def prepare(self) -> None:
        """Its inputs are read now; the first time counts."""
        self.prepared = self.prepared or time.monotonic_ns()

    def compute(self) -> None:
        """There is a result now; the last time counts."""
        self.computed = time.monotonic_ns()

    def wait(self, seconds: float | None) -> None:
        """It waited so long; of several parts the longest counts."""
        self.queued = max(self.queued, int((seconds or 0) * 1e9))


@dataclass
class Work:
    """A request that fits the model's configuration."""

    id: str
    model: str
    inputs: Mapping[str, Tensor]
    batch_size: int
    """First axis of every input; 0 for a model without a batch axis."""
    outputs: frozenset[str]
    """Names of the outputs that are asked for."""
    parameters: Mapping[str, Parameter]
    """Those that are the model's own."""
    priority: int = 0
    queue_timeout: float | None = None
    """Seconds that it may wait; None: as long as the engine lets it."""
    clock: Clock = field(default_factory=Clock)

    def refuse_parameters(self) -> None:
        """ServiceError where there are parameters, for a model that has none."""
        for name in self.parameters:
            raise ServiceError(ErrorKind.INVALID, f"parameter '{name}' is not known to model '{self.model}'")


@dataclass
class Outcome:
    """One response to a request."""

    outputs: list[Tensor]
    final: bool
    """Whether it is the last one."""
