"""Steps in flight, as rank 0 tracks them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.engine.batch import Batch
from hasten.engine.memory import explained_out_of_memory
from hasten.engine.pacing import PacedStep
from hasten.engine.pooling import Pooled
from hasten.engine.sampler import Choice, PromptLogprobs
from hasten.engine.sequence import Sequence

ChooseTokens = Callable[[], Choice | Pooled | None]


class Launched:
    """A step whose work all ranks have, on rank 0."""

    def __init__(
        self, sequences: list[Sequence], prompts: PromptLogprobs, compute: Callable[[], ChooseTokens | None]
    ) -> None:
        self.sequences = sequences
        """Those that get a next token, in the order of the choice."""
        self.prompts = prompts
        """Log-probabilities of prompts that asked for them."""
        self._compute = compute
        self._is_computed = False
        self._choose: ChooseTokens | None = None

    @property
    def reads_tokens(self) -> bool:
        """Whether the choice depends on tokens that earlier steps chose and that the host does not know yet."""
        return any(sequence.constraint is not None and sequence.pending > 1 for sequence in self.sequences)

    def compute(self) -> None:
        """Put the step on this rank's device, up to the choice of its next tokens, unless it is there."""
        if not self._is_computed:
            self._is_computed = True
            self._choose = self._compute()

    def choose(self) -> Choice | Pooled | None:
        """Choose the next tokens of a step, which is then computed, or give what was made of its texts.

        None where no sequence gets one.
        """
        self.compute()
        with explained_out_of_memory(), torch.inference_mode():
            return None if self._choose is None else self._choose()


@dataclass
class InFlightStep:
    """A step that was launched, and whose tokens are not collected yet."""

    launched: Launched
    batch: Batch
    step: PacedStep | None
    """What its time is measured for, if it is."""
    before: "InFlightStep | None"
    """The step that was launched before it, if that was in flight then."""
    choice: Choice | Pooled | None = None
    """The next token of each sequence, once they are chosen, or what was made of texts; None where there are none."""

    @property
    def blocks_next(self) -> bool:
        """Whether its tokens must be known before its sequences can go on."""
        return any(sequence.reads_history for sequence in self.launched.sequences)

    @property
    def seconds(self) -> float | None:
        """How long it took the device, right after its tokens were collected; None where that is not known."""
        if self.before is not None:
            choice, earlier = self.choice, self.before.choice
            if not isinstance(choice, Choice) or not isinstance(earlier, Choice):
                return None
            return choice.seconds_after(earlier)
        return None if self.step is None else time.perf_counter() - self.step.began
