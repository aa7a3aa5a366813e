"""Choices of a batch's next tokens on a CPU as recordings: one call instead of some ten.

The kernels of the second choice that reads the same memory are recorded, and later ones run them again. Where torch
computes a part of a choice, those of its batch are computed op by op.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Chosen:
    """What a choice leaves on its device."""

    tokens_r: Tensor
    logprobs_rw: Tensor | None = None
    """Of the rows that ask for log-probabilities, as `ops.packed_logprobs` has them."""
    beams: ops.BeamChoice | None = None

    @cached_property
    def copy(self) -> ops.HostCopy:
        """All of it on its way to the host: the tokens, what there is of beams, and of log-probabilities.

        What is on the host already, a later choice by the same recording overwrites there.
        """
        beams = () if self.beams is None else self.beams
        return ops.HostCopy([self.tokens_r, *beams, *(() if self.logprobs_rw is None else (self.logprobs_rw,))])


class _Read(NamedTuple):
    """What a choice reads."""

    logits_rv: Tensor
    others: tuple[object, ...]

    def is_same(self, other: "_Read") -> bool:
        """Whether another choice reads the same memory.

        Where the step is a recording, its logits come in the same memory each time.
        """
        return all(map(is_, self.others, other.others)) and _are_same(self.logits_rv, other.logits_rv)


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
        read = _Read(step[0], (*step[1:], masks))
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
