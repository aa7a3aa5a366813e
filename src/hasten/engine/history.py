"""Token counts of running sequences, which penalties read: kept on the device and updated there as tokens are chosen.

So a step with penalties needs nothing from the host, and is launched before the previous step's tokens are known.
"""

import numpy as np
import torch

from hasten import ops
from hasten.engine.sequence import Sequence
from hasten.ops.plan import Integers

_MIN_SLOTS, _MIN_WIDTH = 16, 512
"""Sizes that the tables start with; they double as needed."""
_FREE = -1


class CountedRows:
    """The sequences of a step whose tokens are counted, for as long as they are the same."""

    def __init__(self, sequences: list[Sequence], slots_r: Integers, device: torch.device) -> None:
        self.rows = [row for row, slot in enumerate(slots_r.tolist()) if slot >= 0]
        self.sequences = [sequences[row] for row in self.rows]
        self.slots = slots_r[self.rows]
        self.all_slots = slots_r
        """int32, of all sequences of the step; -1 for those without penalties."""
        self.slots_b = ops.to_device(slots_r, torch.int32, device)
        """The same on the device."""
        self.followed: ops.FollowedCounts | None = None
        """Where beams among them have their counts."""


class TokenHistory:
    """The token counts of each sequence with penalties, one slot per sequence until it is released."""

    def __init__(self, device: torch.device) -> None:
        self.counts = ops.TokenCounts.empty(1, 1, device)
        self._width = 1
        """Distinct tokens that each slot has room for."""
        self.slots: dict[int, int] = {}
        """Sequence key -> slot."""
        self._lengths: Integers = np.full(1, _FREE)
        """Of each slot, the number of tokens counted in it, on the device; `_FREE` where it is no sequence's."""
        self._last: CountedRows | None = None
        """Those of the last step, whose slots have the tokens of `_last_lengths` and `_more` in place of the above."""
        self._last_lengths: list[int] = []
        self._longest = self._more = 0
        self._free = [0]

    def rows_of(self, sequences: list[Sequence]) -> CountedRows:
        """Which of these sequences have penalties, and their slots; see `follow_up`."""
        slots = [self._slot_of(each) if each.params.has_penalty else -1 for each in sequences]
        return CountedRows(sequences, np.array(slots, dtype=np.int32), self.counts.ids_sw.device)

    def _slot_of(self, sequence: Sequence) -> int:
        slot = self.slots.get(sequence.key)
        if slot is None:
            slot = self.slots[sequence.key] = self._allocate()
        return slot

    def follow_up(self, counted: CountedRows, *, is_next: bool) -> None:
        """Let each slot have all tokens of its sequence: those that were not counted as they were chosen.

        There is then room for one more in each. `is_next`: if these were the rows of the last step too, each sequence
        has got the token since that was counted then (`record`), and no other.
        """
        if counted is not self._last or not is_next:
            lengths = [len(each.token_ids) + each.pending for each in counted.sequences]
            self._note_last()
            stale = np.flatnonzero(self._lengths[counted.slots] != np.array(lengths)).tolist()
            if stale:
                self._load([(int(counted.slots[row]), counted.sequences[row]) for row in stale])
            self._last, self._last_lengths, self._longest = counted, lengths, max(lengths)
        self._reserve(self._longest + self._more + 1)

    def record(self) -> None:
        """Note that a token of each sequence that was last followed up is counted in its slot."""
        self._more += 1

    def _note_last(self) -> None:
        if self._last is not None:
            self._lengths[self._last.slots] = np.array(self._last_lengths) + self._more
            self._last, self._more = None, 0

    def release(self, key: int) -> None:
        """Free the slot of a sequence that has ended, if it has one."""
        slot = self.slots.pop(key, None)
        if slot is not None:
            self._note_last()
            self._lengths[slot] = _FREE
            self._free.append(slot)

    def _allocate(self) -> int:
        if not self._free:
            slots = len(self._lengths)
            self.counts = self.counts.grown(max(_MIN_SLOTS, 2 * slots), 1)
            more = self.counts.ids_sw.shape[0] - slots
            self._lengths = np.pad(self._lengths, (0, more), constant_values=_FREE)
            self._free = list(range(slots + more - 1, slots - 1, -1))
        return self._free.pop()

    def _reserve(self, width: int) -> None:
        """Make room for that many distinct tokens per slot."""
        if width > self._width:
            self.counts = self.counts.grown(1, max(_MIN_WIDTH, width, 2 * self._width))
            self._width = self.counts.ids_sw.shape[1]

    def _load(self, stale: list[tuple[int, Sequence]]) -> None:
        if not stale:
            return
        self._reserve(max(sequence.length for _, sequence in stale))
        tokens = [np.array(sequence.token_ids, dtype=np.int64) for _, sequence in stale]
        pairs = [(ids[: s.prompt_len], ids[s.prompt_len :]) for ids, (_, s) in zip(tokens, stale, strict=True)]
        self.counts.load([slot for slot, _ in stale], pairs)
        for slot, sequence in stale:
            self._lengths[slot] = sequence.length
