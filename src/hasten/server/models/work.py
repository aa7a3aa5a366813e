"""What a model gets: a request that fits its configuration."""

import difflib
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hasten.core.sampling import RULES
from hasten.server.engine.queue import DEFAULT_QUEUEING, Queueing
from hasten.server.types import InferResponse, Parameter, Tensor, invalid

_SAMPLING = frozenset(RULES) | {
    *("max_new_tokens", "max_length", "do_sample", "num_beams", "stop_sequences", "typical_p", "best_of"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "response_format"),
}
"""Names of what changes an answer, here and at other servers."""
_LIKENESS = 0.8
"""From which on two names are taken for one, misspelt: `max_token`, `top-k`, `temperatur`."""


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
    queueing: Queueing = DEFAULT_QUEUEING
    version: str = ""
    clock: Clock = field(default_factory=Clock)

    def flag(self, name: str, default: bool = False) -> bool:
        """The value of an input that says yes or no; the default where it is left out."""
        return bool(self.inputs[name].data.ravel()[0]) if name in self.inputs else default

    def response(self, outputs: list[Tensor], final: bool) -> InferResponse:
        """A response with these outputs; `final`: whether it is the last one."""
        return InferResponse(self.model, self.version, self.id, outputs, final)

    def tensor(self, name: str, datatype: str, data: NDArray[np.generic]) -> Tensor:
        """An output with a batch axis of 1 if the inputs have one."""
        return Tensor.of(name, datatype, data[np.newaxis] if self.batch_size else data)

    def known_parameters(self, known: Collection[str] = ()) -> dict[str, Parameter]:
        """The parameters that the model knows; others are ignored, as Triton's models do with what clients add.

        ServiceError where a name that the model does not know says, or seems to say, how to sample: that would change
        the answer.
        """
        for name in self.parameters:
            if name in known:
                continue
            near = difflib.get_close_matches(name, {*known, *_SAMPLING}, 1, _LIKENESS)
            if near:
                hint = f"; did you mean '{near[0]}'?" if near[0] in known else ""
                text = f"parameter '{name}' is not known to model '{self.model}'{hint}"
                raise invalid(text)
        return {name: value for name, value in self.parameters.items() if name in known}


def decoded(text: bytes, name: str) -> str:
    """An element of an input of BYTES as text; ServiceError where it is not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"input '{name}' is not UTF-8: {error}") from None
