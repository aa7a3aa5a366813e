"""Choices of a batch's next tokens on a CPU as recordings: one call instead of some ten.

The kernels of the second choice that reads the same memory are recorded, and later ones run them again. Where torch
computes a part of a choice, those of its batch are computed op by op.
"""

from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hasten import ops
from hasten.engine.beam_choice import BeamLayout
from hasten.engine.history import CountedRows
from hasten.ops.plan import Integers

if TYPE_CHECKING:
    from hasten.ops.native.record import Recording

Masks = tuple[Tensor, Tensor]
"""Which mask each row of logits has, and the masks, as `ops.mask_logits` reads them."""


class ChoiceStep(NamedTuple):
    """What a choice reads on its device, but for masks of grammars: the objects of the step before where it can be."""

    logits_rv: Tensor
    chosen_r: Tensor
    draws: ops.Draws | None
    edits: ops.LogitEdits | None
    beam_edits: ops.LogitEdits | None
    """Of the rows of beams, in their order."""
    beam_masks: Masks | None
    counts: ops.TokenCounts
    counted: CountedRows | None
    layout: BeamLayout | None
    states: ops.BeamStates


class Chosen:
    """What a choice leaves on its device."""

    def __init__(
        self, tokens_r: Tensor, logprobs_rw: Tensor | None = None, beams: ops.BeamChoice | None = None
    ) -> None:
        """`logprobs_rw`: of the rows that ask for log-probabilities, as `ops.packed_logprobs` has them."""
        self.tokens_r, self.logprobs_rw, self.beams = tokens_r, logprobs_rw, beams
        self._copy: ops.HostCopy | None = None
        self._rows: NDArray[np.void] | None = None

    def copy(self) -> ops.HostCopy:
        """All of it on its way to the host: the tokens, what there is of beams, and of log-probabilities.

        Where it is on the host already, it stays where it is, and a later choice may leave other numbers there.
        """
        if self._copy is None or self._copy.is_under_way:
            beams = () if self.beams is None else self.beams
            logprobs = () if self.logprobs_rw is None else (self.logprobs_rw,)
            self._copy, self._rows = ops.HostCopy([self.tokens_r, *beams, *logprobs]), None
        return self._copy

    def packed_rows(self) -> list[bytes]:
        """The rows of `logprobs_rw`, once the copy is there."""
        if self._rows is None:
            assert self._copy is not None, "it was copied before"
            self._rows = as_rows(self._copy.arrays()[-1])
        return self._rows.tolist()


def as_rows(packed_rw: Integers) -> NDArray[np.void]:
    """The same memory with an entry for each row, which as a Python object is bytes."""
    return packed_rw.view(f"V{4 * packed_rw.shape[1]}")[:, 0]


class _Read(NamedTuple):
    """What a choice reads."""

    step: ChoiceStep
    masks: Masks | None

    def is_same(self, other: "_Read") -> bool:
        """Whether another choice reads the same memory.

        Where the step is a recording, its logits come in the same memory each time.
        """
        if self.masks is not other.masks or self.step is other.step:
            return self.masks is other.masks
        (logits_rv, *own), (other_rv, *others) = self.step, other.step
        return all(map(is_, own, others)) and _are_same(logits_rv, other_rv)


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    if one is other:
        return True
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


class RecordedChoice:
    """Choices of one batch."""

    def __init__(self) -> None:
        self._last: _Read | None = None
        self._recorded: tuple[_Read, Recording, Chosen] | None = None
        self._can_record = ops.records()

    def choose(self, step: ChoiceStep, masks: Masks | None, compute: Callable[[], Chosen]) -> Chosen:
        """What `compute` chooses, which reads nothing else; the next choice may overwrite it."""
        read = _Read(step, masks)
        if self._recorded is not None and read.is_same(self._recorded[0]):
            _, recording, chosen = self._recorded
            recording.run()
            return chosen
        last, self._last = self._last, read
        if not self._can_record or last is None or not read.is_same(last):
            return compute()
        with ops.recorded() as recording:
            chosen = compute()
        self._can_record = recording.is_whole
        self._recorded = (read, recording, chosen) if recording.is_whole else None
        return chosen
