"""Edits of a batch's logits before tokens are chosen, and the token counts that penalties read.

Shapes: s slots, w entries of a slot, k edited rows, b biases, n bans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.ops.plan import Integers
from hasten.ops.transfer import send, to_device

IN_PROMPT = 1 << 30
"""Flag of an entry whose token occurs in the prompt; the bits below it count occurrences in the output."""


@dataclass(frozen=True)
class TokenCounts:
    """The distinct tokens of sequences and their counts, on a device, one slot per sequence.

    A slot lists its tokens in order of first occurrence, so a new token is appended and nothing is sorted.
    """

    ids_sw: Tensor
    """int32; entries from a slot's size on are undefined."""
    counts_sw: Tensor
    """int32, occurrences in the output, with `IN_PROMPT` added for tokens of the prompt."""
    sizes_s: Tensor
    """int32, entries of each slot."""

    @classmethod
    def empty(cls, slots: int, width: int, device: torch.device) -> "TokenCounts":
        """Slots without tokens."""
        ids_sw, counts_sw = (torch.zeros(slots, width, dtype=torch.int32, device=device) for _ in range(2))
        return cls(ids_sw, counts_sw, torch.zeros(slots, dtype=torch.int32, device=device))

    def grown(self, slots: int, width: int) -> "TokenCounts":
        """A copy with at least as many slots and entries per slot as this and as given."""
        old_slots, old_width = self.ids_sw.shape
        larger = TokenCounts.empty(max(slots, old_slots), max(width, old_width), self.ids_sw.device)
        larger.ids_sw[:old_slots, :old_width] = self.ids_sw
        larger.counts_sw[:old_slots, :old_width] = self.counts_sw
        larger.sizes_s[:old_slots] = self.sizes_s
        return larger

    def follow(self, followed: "FollowedCounts", parents_b: Tensor) -> None:
        """The definition of `ops.follow_counts`."""
        slots_b, seats_k, firsts_k = followed
        sources_k, targets_k = slots_b[firsts_k + parents_b[seats_k]], slots_b[seats_k]
        for each in (self.ids_sw, self.counts_sw, self.sizes_s):
            each.index_copy_(0, targets_k, each.index_select(0, sources_k))

    def load(self, slots: Sequence[int], sequences: Sequence[tuple[Integers, Integers]]) -> None:
        """Replace slots by sequences' prompt and output tokens, from the host."""
        entries = [_entries(prompt, output) for prompt, output in sequences]
        width = max(len(ids) for ids, _ in entries)
        rows = np.zeros((2, len(entries), width), dtype=np.int32)
        for row, (ids, counts) in enumerate(entries):
            rows[:, row, : len(ids)] = ids, counts
        sizes = np.array([len(ids) for ids, _ in entries], dtype=np.int32)
        sent = send({"rows": rows, "sizes": sizes, "slots": np.array(slots, dtype=np.int32)}, self.ids_sw.device)
        slots_k = sent["slots"].long()
        self.ids_sw[:, :width].index_copy_(0, slots_k, sent["rows"][0])
        self.counts_sw[:, :width].index_copy_(0, slots_k, sent["rows"][1])
        self.sizes_s.index_copy_(0, slots_k, sent["sizes"])


def _entries(prompt: Integers, output: Integers) -> tuple[Integers, Integers]:
    """The distinct tokens of a sequence and their counts."""
    ids, inverse = np.unique(np.concatenate((prompt, output)), return_inverse=True)
    counts = np.bincount(inverse[len(prompt) :], minlength=len(ids))
    counts[inverse[: len(prompt)]] += IN_PROMPT
    return ids, counts


class FollowedCounts(NamedTuple):
    """Where the token counts of beams stand; int64 on their device."""

    slots_b: Tensor
    """Slots of all for which a step chooses tokens, -1 for those without."""
    seats_k: Tensor
    """Beams with counts, by their places among those."""
    firsts_k: Tensor
    """The place of beam 0 of the search of each."""

    @classmethod
    def of(cls, slots_b: Integers, firsts_b: Sequence[int], device: torch.device) -> "FollowedCounts | None":
        """`firsts_b`: for all the place of beam 0 of their search, -1 for what is no beam. None: no beam has counts."""
        seats = [seat for seat, first in enumerate(firsts_b) if first >= 0 and slots_b[seat] >= 0]
        numbers = (slots_b, seats, [firsts_b[seat] for seat in seats])
        return cls(*(to_device(each, torch.int64, device) for each in numbers)) if seats else None


class Bans(NamedTuple):
    """Tokens that must not come next, on the host: int32 arrays of equal length."""

    ids: Integers
    after: Integers
    """The token that must be the last one chosen for the ban to hold, -1 for a ban that always holds."""


class EditList:
    """The edits of a batch as the host collects them, row by row."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._slots: list[int] = []
        self._penalties: list[tuple[float, float, float]] = []
        self._chosen: list[int] = []
        self._bias_counts: list[int] = []
        self._bias_ids: list[Integers] = []
        self._biases: list[NDArray[np.float32]] = []
        self._ban_counts: list[int] = []
        self._bans: list[Bans] = []

    def add(
        self,
        row: int,
        *,
        slot: int,
        penalties: tuple[float, float, float],
        bias_ids: Integers,
        biases: NDArray[np.float32],
        bans: Bans,
        chosen: int,
    ) -> None:
        """Edit a row of the logits.

        `penalties` are repetition, presence and frequency, over the tokens of `slot` (-1: none); `chosen` is the index
        of the row's last token among those that the previous step chose.
        """
        self.rows.append(row)
        self._slots.append(slot)
        self._penalties.append(penalties)
        self._chosen.append(chosen)
        self._bias_counts.append(len(bias_ids))
        if len(bias_ids):
            self._bias_ids.append(bias_ids)
            self._biases.append(biases)
        self._ban_counts.append(len(bans.ids))
        if len(bans.ids):
            self._bans.append(bans)

    def to(self, device: torch.device) -> "LogitEdits":
        """The edits on a device, in one copy."""
        arrays: dict[str, Integers] = {
            "rows": np.array(self.rows, dtype=np.int32),
            "slots": np.array(self._slots, dtype=np.int32),
            "penalties": np.array(self._penalties, dtype=np.float32).view(np.int32),
            "chosen": np.array(self._chosen, dtype=np.int32),
            "bias_starts": _starts(self._bias_counts),
            "bias_ids": _joined(self._bias_ids),
            "biases": _joined([biases.view(np.int32) for biases in self._biases]),
            "ban_starts": _starts(self._ban_counts),
            "ban_ids": _joined([bans.ids for bans in self._bans]),
            "ban_after": _joined([bans.after for bans in self._bans]),
        }
        sent = send(arrays, device)
        return LogitEdits(
            rows_k=sent["rows"],
            slots_k=sent["slots"],
            penalties_k3=sent["penalties"].view(torch.float32),
            chosen_k=sent["chosen"],
            bias_starts=sent["bias_starts"],
            bias_ids_b=sent["bias_ids"],
            biases_b=sent["biases"].view(torch.float32),
            ban_starts=sent["ban_starts"],
            ban_ids_n=sent["ban_ids"],
            ban_after_n=sent["ban_after"],
        )


def _starts(counts: list[int]) -> Integers:
    return np.cumsum([0, *counts], dtype=np.int32)


def _joined(parts: list[Integers]) -> Integers:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class LogitEdits:
    """Penalties, biases and bans of k rows, on the device of the logits; all int32 but penalties and biases (fp32)."""

    rows_k: Tensor
    """The rows of the logits, each at most once."""
    slots_k: Tensor
    """Slots of their token counts, -1 for rows without penalties."""
    penalties_k3: Tensor
    """Repetition, presence and frequency penalty."""
    chosen_k: Tensor
    """Index of each row's last token among those that the previous step chose."""
    bias_starts: Tensor
    """[k + 1], where each row's biases start."""
    bias_ids_b: Tensor
    biases_b: Tensor
    ban_starts: Tensor
    """[k + 1], where each row's bans start."""
    ban_ids_n: Tensor
    ban_after_n: Tensor
    """The last token that a ban depends on, -1 for a ban that always holds."""
