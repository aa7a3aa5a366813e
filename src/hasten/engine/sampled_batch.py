"""What a choice of next tokens needs of a batch's sequences, kept for as long as the batch is the same.

Most steps have the sequences of the step before: what does not depend on their tokens is laid out once.
"""

from dataclasses import replace
from operator import is_
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hasten import ops
from hasten.engine.constraint import fill_allowed
from hasten.engine.edits import RowEdits
from hasten.engine.history import CountedRows
from hasten.engine.points import seeds_of, uniforms
from hasten.engine.recorded_choice import Masks, RecordedChoice
from hasten.engine.sequence import Sequence
from hasten.ops.plan import Integers
from hasten.ops.transfer import host_buffer

if TYPE_CHECKING:
    from hasten.engine.sampler import PreparedChoice

_CPU = torch.device("cpu")


class EditedRows:
    """The rows of some logits that requests change, with the edits of the last step."""

    def __init__(self, sequences: dict[int, Sequence], edits: dict[int, RowEdits]) -> None:
        """By row of the logits; of sequences without edits nothing is kept."""
        self._sequences = {row: sequence for row, sequence in sequences.items() if edits[row].any}
        self._own = [edits[row] for row in self._sequences]
        self.is_constant = all(own.is_constant for own in self._own)
        """Whether the edits are the same at every step."""
        self._last: tuple[list[ops.Bans], list[int], ops.LogitEdits] | None = None

    def __bool__(self) -> bool:
        return bool(self._own)

    def edits(self, slots: dict[int, int], device: torch.device) -> ops.LogitEdits:
        """Penalties, biases and bans: those of the last step where all are the same.

        `slots` of token counts, by the sequence's key; the same each time.
        """
        if self._last is not None and self.is_constant:
            return self._last[2]
        sequences = self._sequences.values()
        bans = [own.bans(sequence) for own, sequence in zip(self._own, sequences, strict=True)]
        chosen = [sequence.pending_row if sequence.pending else 0 for sequence in sequences]
        if self._last is not None:
            last_bans, last_chosen, edits = self._last
            if chosen == last_chosen and all(map(is_, bans, last_bans)):
                return edits
        found = ops.EditList()
        for (row, sequence), own, banned, pending_row in zip(
            self._sequences.items(), self._own, bans, chosen, strict=True
        ):
            own.add_to(found, row, slots.get(sequence.key, -1), banned, pending_row)
        self._last = bans, chosen, found.to(device)
        return self._last[2]


class MaskedRows:
    """The rows of some logits whose next token is to be among some: as a grammar or the request itself says."""

    def __init__(self, sequences: dict[int, Sequence], edits: dict[int, RowEdits], rows: int) -> None:
        """Some of so many rows of logits, with the edits of each."""
        given = {row: sequence.constraint for row, sequence in sequences.items()}
        self._constraints = {row: own for row, own in given.items() if own is not None}
        self._allowed = {row: own for row in sequences if (own := edits[row].allowed) is not None}
        self._masked_rows = [*self._constraints, *self._allowed]
        self._rows = rows
        self._masks: Masks | None = None

    def masks(self, logits_rv: Tensor) -> Masks | None:
        """The masks of all logits at this step; None where no row has one.

        The grammars must have accepted all tokens before. On a CPU it is the same object each time, with other bits.
        """
        if not self._masked_rows:
            return None
        device = logits_rv.device
        if self._masks is None or device.type != "cpu":
            self._masks = self._laid_out(logits_rv.shape[1], device)
            return self._masks
        self._fill(self._masks[1])
        return self._masks

    def _laid_out(self, vocab: int, device: torch.device) -> Masks:
        words = max([-(-vocab // 32), *(own.words for own in self._constraints.values())])
        host_kw = host_buffer((len(self._masked_rows), words), device)
        masks: Integers = host_kw.numpy()
        for mask, own in zip(masks[len(self._constraints) :], self._allowed.values(), strict=True):
            mask[: len(own)], mask[len(own) :] = own, 0
        self._fill(host_kw)
        if self._masks is None:
            index: Integers = np.full(self._rows, -1, np.int32)
            index[self._masked_rows] = np.arange(len(self._masked_rows))
            index_r = ops.to_device(index, torch.int32, device)
        else:
            index_r, _ = self._masks
        return index_r, host_kw.to(device, non_blocking=True)

    def _fill(self, masks_kw: Tensor) -> None:
        if self._constraints:
            fill_allowed(list(self._constraints.values()), masks_kw.numpy()[: len(self._constraints)])


class SampledBatch:
    """The sequences of a step that get a next token, in the order of their rows of logits."""

    def __init__(self, sequences: list[Sequence], edits: list[RowEdits], device: torch.device) -> None:
        """`edits`: those of each sequence."""
        params = [sequence.params for sequence in sequences]
        self.sequences = list(sequences)
        self.single = {row: sequence for row, sequence in enumerate(sequences) if sequence.beams is None}
        """Sequences that are no beams, by row."""
        by_row = dict(enumerate(edits))
        self.edited = EditedRows(self.single, by_row)
        self.masked = MaskedRows(self.single, by_row, len(sequences))
        self.has_forced = any(sequence.forced for sequence in sequences)
        self.has_penalties = any(each.has_penalty for each in params)
        self.logprobs = {row: each.logprobs for row, each in enumerate(params) if each.logprobs is not None}
        self.drawn = [row for row in self.single if not params[row].greedy]
        """Rows that are drawn; the others get their most probable token."""
        self.prepared: PreparedChoice | None = None
        """The last choice, which the sampler sets where the next one of the batch may differ in its numbers alone."""
        self._next_lengths: list[int] = []
        """Of all sequences at the next step, if each gets one token until then."""
        self.counted: CountedRows | None = None
        """Whose tokens are counted, which the sampler sets; None before."""
        self._draws = _Draws([sequences[row] for row in self.drawn]) if self.drawn else None
        self.beam_rows = [row for row in range(len(sequences)) if row not in self.single]
        self.beams = {index: sequences[row] for index, row in enumerate(self.beam_rows)}
        """Sequences that are beams, by their place among them."""
        own = {index: edits[row] for index, row in enumerate(self.beam_rows)}
        self.edited_beams, self.masked_beams = EditedRows(self.beams, own), MaskedRows(self.beams, own, len(own))
        self.can_record = device.type == "cpu" and not self.has_forced
        """Whether kernels alone may compute its choices, which `recorded` then has."""
        self.recorded = RecordedChoice()
        self._leaders = [each.beams.leader for each in self.beams.values() if each.beams is not None]

    @property
    def is_constant(self) -> bool:
        """Whether its choices differ in points, counts and masks alone, all of which stay where they are."""
        return self.can_record and not self.beams and self.edited.is_constant

    @property
    def successors(self) -> list[Sequence]:
        """The sequences that get tokens: those of the batch, and of a search that begins all beams."""
        if all(leader.length > leader.prompt_len for leader in self._leaders):
            return self.sequences
        return [each for sequence in self.sequences for each in sequence.successors]

    def note_step(self) -> bool:
        """Note that a step begins; whether each sequence has got one token since the last one."""
        lengths = [len(each.token_ids) + each.pending for each in self.sequences]
        is_next = lengths == self._next_lengths
        self._next_lengths = [length + 1 for length in lengths]
        return is_next

    def draws(self, device: torch.device, *, is_next: bool) -> ops.Draws | None:
        """How the next tokens of `drawn` are drawn; None where there are no such rows.

        On a CPU it is the same object each time, with other points. `is_next`: as `note_step` says.
        """
        return None if self._draws is None else self._draws.next(device, is_next=is_next)


_STEPS = 32
"""Steps whose points are computed together."""


class _Draws:
    """How some sequences are drawn at their next steps."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self._sequences = sequences
        params = [sequence.params for sequence in sequences]
        self._draws = ops.Draws.of(
            temperature=[p.temperature for p in params],
            top_k=[max(p.top_k, 0) for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            point=[0.0] * len(params),
            device=_CPU,
        )
        # the points of all rows side by side
        self._draws = replace(self._draws, packed_r5=self._draws.packed_r5.t().contiguous().t())
        self._now = self._draws.packed_r5.t()[4].numpy().data.cast("B").cast("d")
        self._seeds = seeds_of([sequence.seed for sequence in sequences])
        self._points = memoryview(b"").cast("d")
        """Of steps after the last one."""

    def next(self, device: torch.device, *, is_next: bool) -> ops.Draws:
        """With the points of the sequences' next tokens; `is_next`: each has got one since the last call."""
        if not is_next or not self._points:
            lengths = [len(each.token_ids) + each.pending - each.prompt_len for each in self._sequences]
            points = uniforms(self._seeds, np.array(lengths) + np.arange(_STEPS)[:, np.newaxis])
            self._points = points.ravel().data.cast("B").cast("d")
        # views of memory, as numpy would take several times as long to copy so few numbers
        self._now[:], self._points = self._points[: len(self._now)], self._points[len(self._now) :]
        if device.type == "cpu":
            return self._draws
        packed_r5 = np.array(self._draws.packed_r5.numpy(), order="C")
        return ops.Draws(ops.to_device(packed_r5, torch.float64, device), self._draws.filters)
