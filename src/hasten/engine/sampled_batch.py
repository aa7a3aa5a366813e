"""What a choice of next tokens needs of a batch's sequences, kept for as long as the batch is the same.

Most steps have the sequences of the step before: what does not depend on their tokens is laid out once.
"""

from collections.abc import Iterable
from operator import is_

import torch

from hasten import ops
from hasten.core.types import SamplingParams
from hasten.engine.edits import RowEdits
from hasten.engine.points import seeds_of, uniforms
from hasten.engine.sequence import Sequence
from hasten.ops.plan import Integers

_CPU = torch.device("cpu")


class EditedRows:
    """The rows of some logits that requests change, with the edits of the last step."""

    def __init__(self, sequences: dict[int, Sequence], edits: dict[int, RowEdits]) -> None:
        """By row of the logits; of sequences without edits nothing is kept."""
        self._sequences = {row: sequence for row, sequence in sequences.items() if edits[row].any}
        self._own = [edits[row] for row in self._sequences]
        self._last: tuple[list[ops.Bans], list[int], ops.LogitEdits] | None = None

    def __bool__(self) -> bool:
        return bool(self._own)

    def edits(self, slots: dict[int, int], device: torch.device) -> ops.LogitEdits:
        """Penalties, biases and bans: those of the last step where all are the same.

        `slots` of token counts, by the sequence's key; the same each time.
        """
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


class SampledBatch:
    """The sequences of a step that get a next token, in the order of their rows of logits."""

    def __init__(self, sequences: list[Sequence], edits: list[RowEdits]) -> None:
        """`edits`: those of each sequence."""
        params = [sequence.params for sequence in sequences]
        self.sequences = list(sequences)
        self.single = {row: sequence for row, sequence in enumerate(sequences) if sequence.beams is None}
        """Sequences that are no beams, by row."""
        self.edited = EditedRows(self.single, {row: edits[row] for row in self.single})
        self.has_forced = any(sequence.forced for sequence in sequences)
        self.has_penalties = any(each.has_penalty for each in params)
        self.allowed = allowed_of({row: edits[row] for row in self.single})
        self.constrained = [row for row, sequence in enumerate(sequences) if sequence.constraint is not None]
        self.logprobs = {row: each.logprobs for row, each in enumerate(params) if each.logprobs is not None}
        self.drawn = [row for row in self.single if not params[row].greedy]
        """Rows that are drawn; the others get their most probable token."""
        self.slots_r: Integers | None = None
        """int32, slots of token counts, -1 for rows without, which the sampler sets; None before."""
        drawn = [sequences[row] for row in self.drawn]
        self._draws = _draws([sequence.params for sequence in drawn]) if drawn else None
        self._seeds = seeds_of([sequence.seed for sequence in drawn])
        self.beam_rows = [row for row in range(len(sequences)) if row not in self.single]
        self.beams = {index: sequences[row] for index, row in enumerate(self.beam_rows)}
        """Sequences that are beams, by their place among them."""
        own = {index: edits[row] for index, row in enumerate(self.beam_rows)}
        self.edited_beams, self.allowed_beams = EditedRows(self.beams, own), allowed_of(own)

    @property
    def successors(self) -> list[Sequence]:
        """The sequences that get tokens: those of the batch, and of a search that begins all beams."""
        leaders = (each.beams.leader for each in self.beams.values() if each.beams is not None)
        if all(leader.length > leader.prompt_len for leader in leaders):
            return self.sequences
        return [each for sequence in self.sequences for each in sequence.successors]

    def draws(self, device: torch.device) -> ops.Draws | None:
        """How the next tokens of `drawn` are drawn; None where there are no such rows."""
        if self._draws is None:
            return None
        packed_r5 = self._draws.packed_r5.numpy().copy()
        packed_r5[:, 4] = uniforms(self._seeds, [self.sequences[row].output_len for row in self.drawn])
        return ops.Draws(ops.to_device(packed_r5, torch.float64, device), self._draws.filters)


def allowed_of(edits: dict[int, RowEdits]) -> dict[int, Integers]:
    """Masks of the rows whose requests name the only tokens that may come next."""
    return {row: own.allowed for row, own in edits.items() if own.allowed is not None}


def _draws(params: Iterable[SamplingParams]) -> ops.Draws:
    """How each row is drawn, on the host and without points."""
    params = list(params)
    return ops.Draws.of(
        temperature=[p.temperature for p in params],
        top_k=[max(p.top_k, 0) for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        point=[0.0] * len(params),
        device=_CPU,
    )
