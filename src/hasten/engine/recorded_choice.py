"""Choices of a batch's next tokens on a CPU as recordings: one call instead of some ten.

The kernels of the second choice that reads the same memory are recorded, and later ones run them again. Where torch
computes a part of a choice, those of its batch are computed op by op.
"""

from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from hasten import ops
from hasten.engine.beam_choice import BeamLayout
from hasten.engine.history import CountedRows

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


class Chosen(NamedTuple):
    """What a choice leaves on its device."""

    tokens_r: Tensor
    tops: ops.TopLogprobs | None
    beams: ops.BeamChoice | None


class _Read(NamedTuple):
    """What a choice reads."""

    where: tuple[int, ...]
    """Address and shape of its logits: where the step is a recording, they come in the same memory each time."""
    others: tuple[object, ...]

    def is_same(self, other: "_Read") -> bool:
        """Whether another choice reads the same memory."""
        return self.where == other.where and all(map(is_, self.others, other.others))


class RecordedChoice:
    """Choices of one batch."""

    def __init__(self) -> None:
        self._last: _Read | None = None
        self._recorded: tuple[_Read, Recording, Chosen] | None = None
        self._can_record = ops.records()

    def choose(self, step: ChoiceStep, masks: Masks | None, compute: Callable[[], Chosen]) -> Chosen:
        """What `compute` chooses, which reads nothing else; the next choice may overwrite it."""
        logits_rv, *others = step
        read = _Read((logits_rv.data_ptr(), *logits_rv.shape, *logits_rv.stride()), (*others, masks))
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
