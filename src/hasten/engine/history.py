"""Token counts of running sequences, which penalties read: kept on the device and updated there as tokens are chosen.

So a step with penalties needs nothing from the host, and is launched before the previous step's tokens are known.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hasten import ops
from hasten.engine.sequence import Sequence
from hasten.ops.plan import Integers

_MIN_SLOTS, _MIN_WIDTH = 16, 512
"""Sizes that the tables start with; they double as needed."""
_FREE = -(1 << 40)
"""Of no sequence, even when some tokens more are counted."""


class TokenHistory:
    """The token counts of each sequence with penalties, one slot per sequence until it is released."""

    def __init__(self, device: torch.device) -> None:
        self.counts = ops.TokenCounts.empty(1, 1, device)
        self.slots: dict[int, int] = {}
        """Sequence key -> slot."""
        self._lengths: Integers = np.full(1, _FREE)
        """Of each slot, the number of tokens counted in it, on the device; `_FREE` where it is no sequence's."""
        self._free = [0]

    def slots_of(self, sequences: Iterable[Sequence]) -> Integers:
        """The slots of these sequences [int32], -1 for those without penalties; see `follow_up`."""
        return np.array([self._slot_of(each) if each.params.has_penalty else -1 for each in sequences], dtype=np.int32)

    def _slot_of(self, sequence: Sequence) -> int:
        slot = self.slots.get(sequence.key)
        if slot is None:
            slot = self.slots[sequence.key] = self._allocate()
        return slot

    def follow_up(self, sequences: list[Sequence], slots_r: Integers) -> None:
        """Let each slot have all tokens of its sequence: those that were not counted as they were chosen."""
        rows = np.flatnonzero(slots_r >= 0)
        lengths = np.array([len(sequences[row].token_ids) + sequences[row].pending for row in rows.tolist()])
        stale = rows[self._lengths[slots_r[rows]] != lengths].tolist()
        self._load([(int(slots_r[row]), sequences[row]) for row in stale])

    def record(self, slots_r: Integers, tokens_r: Tensor) -> None:
        """Count the token of each row in its slot, if that is not -1; a slot may have been released meanwhile."""
        slots = slots_r[slots_r >= 0]
        self._lengths[slots] += 1
        self._reserve(int(self._lengths[slots].max(initial=0)))
        ops.count_tokens(self.counts, ops.to_device(slots_r, torch.int32, tokens_r.device), tokens_r)

    def follow(self, firsts_b: list[int], slots_b: Integers, parents_b: Tensor) -> None:
        """Let beams have the counts of the beams that they continue, by number.

        `firsts_b`: for each beam the place of beam 0 of its search, -1 for what is no beam. A slot of -1 is none.
        """
        rows = [row for row, first in enumerate(firsts_b) if first >= 0 and slots_b[row] >= 0]
        if not rows:
            return
        numbers = (slots_b, rows, [firsts_b[row] for row in rows])
        own_b, places_k, firsts_k = (ops.to_device(each, torch.int64, parents_b.device) for each in numbers)
        sources_k = firsts_k + parents_b[places_k]
        self.counts.copy(own_b[sources_k], own_b[places_k])

    def release(self, key: int) -> None:
        """Free the slot of a sequence that has ended, if it has one."""
        slot = self.slots.pop(key, None)
        if slot is not None:
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
        held = self.counts.ids_sw.shape[1]
        if width > held:
            self.counts = self.counts.grown(1, max(_MIN_WIDTH, width, 2 * held))

    def _load(self, stale: list[tuple[int, Sequence]]) -> None:
        if not stale:
            return
        self._reserve(max(sequence.length for _, sequence in stale))
        tokens = [np.array(sequence.token_ids, dtype=np.int64) for _, sequence in stale]
        pairs = [(ids[: s.prompt_len], ids[s.prompt_len :]) for ids, (_, s) in zip(tokens, stale, strict=True)]
        self.counts.load([slot for slot, _ in stale], pairs)
        for slot, sequence in stale:
            self._lengths[slot] = sequence.length
