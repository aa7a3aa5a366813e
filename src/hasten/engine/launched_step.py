"""A step whose work is on its way, as rank 0 sees it."""

from collections.abc import Callable

import torch

from hasten.engine.memory import explained_out_of_memory
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
