"""Requests that the engine has, with the outputs they have so far."""

import time
from dataclasses import dataclass, field

from hasten.core.types import (
    CompletionOutput,
    LogprobList,
    PooledOutput,
    PoolingRequestOutput,
    Request,
    RequestOutput,
)
from hasten.engine.beam import BeamSearch
from hasten.engine.sequence import Sequence
from hasten.engine.text import TextState

Output = RequestOutput | PoolingRequestOutput[PooledOutput]
"""What became of a request: text, or a vector or scores of it."""


@dataclass
class Completion:
    """One completion under way."""

    output: CompletionOutput
    text: TextState | None
    sequence: Sequence
    continues: bool
    """Whether it stands behind text, so that its first token is not decoded as a text's first."""
    hidden_tokens: int = 0
    """Tokens at the end that ended it and are no part of its text."""


@dataclass
class RequestState:
    """A request under way, and the outputs it has so far."""

    request: Request
    output: RequestOutput
    completions: dict[int, Completion] = field(default_factory=dict)
    """By the sequence's index."""
    unfinished: int = 0
    stream: bool = False
    continues: bool = False
    """Whether the prompt has text."""
    search: BeamSearch | None = None
    """Of a request with beams, whose completions come when it is done."""

    @property
    def keys(self) -> list[int]:
        """Of its sequences."""
        if self.search is not None:
            return self.search.keys
        return [completion.sequence.key for completion in self.completions.values()]

    def shown(self) -> RequestOutput:
        """What it has so far; unfinished completions show the text that no stop string can take back."""
        for completion in self.completions.values():
            output = completion.output
            if completion.text is not None and output.finish_reason is None:
                output.text = completion.text.settled
            if isinstance(output.logprobs, LogprobList):
                output.cumulative_logprob = output.logprobs.sum
        if len(self.output.outputs) != len(self.completions):
            self.output.outputs = [completion.output for _, completion in sorted(self.completions.items())]
        if self.unfinished == 0 and not self.output.finished:
            self.output.finished, self.output.metrics.last_token_ts = True, time.monotonic()
        return self.output


@dataclass(slots=True)
class PoolingState:
    """A text under way of which a vector or scores are to be made."""

    request: Request
    sequence: Sequence
    output: PoolingRequestOutput[PooledOutput] | None = None
    stream: bool = False

    @property
    def unfinished(self) -> int:
        """1 until it is done."""
        return 1 if self.output is None else 0

    @property
    def keys(self) -> list[int]:
        """Of its sequence."""
        return [self.sequence.key]

    def shown(self) -> PoolingRequestOutput[PooledOutput]:
        """What was made of it, once it is done."""
        assert self.output is not None
        return self.output


State = RequestState | PoolingState
