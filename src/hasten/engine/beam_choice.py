"""The next beams of a batch's searches: chosen on the device, from state that is kept there.

So a search needs nothing from the host between two steps, and is launched before the previous step's choice is known.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten import ops
from hasten.engine.beam import BeamStep, Continuations, candidate_count, end_tokens
from hasten.engine.sequence import Sequence

_MIN_SLOTS = 16
"""Searches that there is room for at first; it doubles as needed."""


class BeamRecords:
    """What running searches keep on the device, a slot per search until it is released."""

    def __init__(self, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self.states = ops.BeamStates.empty(_MIN_SLOTS, 1, device)
        self._eos_token_ids = eos_token_ids
        self._slots: dict[int, int] = {}
        """Key of the sequence that leads a search -> slot."""
        self._free = list(range(_MIN_SLOTS))
        self._last: BeamLayout | None = None

    def release(self, key: int) -> None:
        """Free the slot of a search whose leader has ended, if this is one."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._free.append(slot)

    def layout(self, sequences: list[Sequence], successors: list[Sequence], device: torch.device) -> "BeamLayout":
        """The searches of a batch, whose sequences get tokens for `successors`: that of the last step if it fits."""
        begins = len(successors) > len(sequences)
        last = self._last
        if last is not None and not begins and last.sequences == sequences:
            return last
        by_row: dict[int, ops.Search] = {}
        rows: list[int] = []
        first_row = 0
        for row, sequence in enumerate(sequences):
            count = len(sequence.successors)
            if sequence.beams is not None:
                if sequence is sequence.beams.leader:
                    width = sequence.params.beam_width
                    by_row[row] = self._search(sequence, first_row, 1 if count == width else width, len(rows))
                first_row += 1
            rows += [row] * count
        searches = ops.BeamSearches.of(list(by_row.values()), device)
        layout = BeamLayout(list(sequences), by_row, searches, rows)
        self._last = None if begins else layout
        return layout

    def _search(self, leader: Sequence, first_row: int, rows: int, first_chosen: int) -> ops.Search:
        params, eos = leader.params, self._eos_token_ids
        slot = self._slots.get(leader.key)
        if slot is None:
            slot = self._slots[leader.key] = self._allocate(params.beam_width)
        return ops.Search(
            slot=slot,
            first_row=first_row,
            rows=rows,
            width=params.beam_width,
            keep=candidate_count(params, eos),
            first_chosen=first_chosen,
            rate=params.beam_search_diversity_rate,
            end_tokens=tuple(end_tokens(params, eos)),
        )

    def _allocate(self, width: int) -> int:
        slots = self.states.order_sw.shape[0]
        if not self._free:
            self._free = list(range(slots, 2 * slots))
            slots *= 2
        self.states = self.states.grown(slots, width)
        return self._free.pop()


@dataclass(frozen=True)
class BeamLayout:
    """Where the searches of a batch stand: the same in each step of the same sequences but for the first."""

    sequences: list[Sequence]
    by_row: dict[int, ops.Search]
    """The searches, by the row of their first beam."""
    searches: ops.BeamSearches
    """The same, on the device."""
    rows: list[int]
    """For each token that is chosen the row of the sequence after which it comes."""

    @cached_property
    def families(self) -> list[int]:
        """For each token that is chosen for a beam the place of beam 0 of its search, -1 for others."""
        firsts = [-1] * len(self.rows)
        for search in self.by_row.values():
            firsts[search.first_chosen : search.first_chosen + search.width] = [search.first_chosen] * search.width
        return firsts

    @cached_property
    def no_tokens(self) -> Tensor:
        """A token for each row, whichever."""
        return torch.zeros(len(self.rows), dtype=torch.int32, device=self.searches.numbers_s.device)

    def choose(
        self, states: ops.BeamStates, values_rk: Tensor, ids_rk: Tensor, tokens_r: Tensor, vocab: int
    ) -> ops.BeamChoice:
        """Choose by the most probable tokens after each beam of the batch, and their log-probabilities.

        Sequences without beams keep the tokens of their rows.
        """
        chosen_2b = ops.BeamChoice.room(len(self.rows), tokens_r.device)
        if -1 in self.families:
            chosen_2b[0] = tokens_r[ops.to_device(self.rows, torch.int64, tokens_r.device)]
        return ops.choose_beams(states, self.searches, values_rk, ids_rk, chosen_2b, vocab)


def beam_steps(searches: dict[int, ops.Search], arrays: list[NDArray[Any]]) -> dict[int, BeamStep]:
    """How searches go on, by the row of their first beam, from an `ops.BeamChoice` on the host."""
    (tokens, parents), logprobs, *best = (array.tolist() for array in arrays)
    steps = {}
    for index, (row, search) in enumerate(searches.items()):
        own = slice(search.first_chosen, search.first_chosen + search.width)
        beams = Continuations(parents[own], tokens[own], logprobs[own])
        steps[row] = BeamStep(beams, Continuations(*(column[index][: search.width] for column in best)))
    return steps
