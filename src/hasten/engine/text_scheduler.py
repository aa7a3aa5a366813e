"""Texts of which vectors or scores are made, and who of them is computed in the next step. Never imports torch.

Each is computed whole, in one step, and nothing comes after it. So none holds blocks of a cache, waits for another's
tokens or gives way: a step takes those that came first, as many as it has room for.
"""

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hasten.core.types import Request
from hasten.engine.batch import Batch
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence


class TextSequence(Sequence):
    """A text on its way through the engine: what steps want to know of a sequence, most of it the same for all."""

    __slots__ = ("ids", "position_rows", "request")

    beams = None
    constraint = None
    encoder_input = None
    group_size = 1
    in_flight = 0
    index = 0
    is_plain = True
    num_computed = 0
    parent = None
    pending = 0
    reads_history = False
    wants_prompt_logprobs = False

    def __init__(
        self, request: Request, ids: NDArray[np.int32], num_states: int, rows: NDArray[np.int32] | None
    ) -> None:
        """`num_states`: of its last tokens, how many need hidden states."""
        self.request = request
        self.request_id = request.request_id
        self.key = -1
        self.is_waiting = False
        self.pooling = request.pooling
        self.masks = request.masks
        self.ids = ids
        """[t]"""
        self.prompt_len = self.max_length = len(ids)
        self.num_states = num_states
        self.position_rows = rows
        """[t]: rows of its tokens in the model's table of positions, where those are not their positions."""

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.prompt_len


def as_ids(token_ids: Iterable[int]) -> NDArray[np.int32]:
    """Token ids as an array; OverflowError where one has more than 32 bits."""
    return np.frombuffer(array("i", token_ids), dtype=np.int32)


class TextScheduler(Scheduler):
    """A scheduler of texts alone."""

    _waiting_tokens = 0
    """Of the texts that wait."""

    @property
    def has_room(self) -> bool:
        """Whether a further text might be in the next step."""
        return len(self.waiting) < self._max_joint and self._waiting_tokens < self._max_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a text behind all others."""
        self._register_key(sequence)
        self.waiting.append(sequence)
        self._waiting_tokens += sequence.prompt_len
        sequence.is_waiting = True

    def schedule(self, prompt_tokens: int | None = None) -> Batch:
        """The next step's texts: in the order in which they came, but one at least, while there is room for them."""
        batch, room, waiting = Batch(self._next_number), self._max_tokens, self.waiting
        sequences, counts, needed = batch.sequences, batch.counts, batch.needed
        while waiting and len(sequences) < self._max_joint:
            sequence = waiting[0]
            count = sequence.prompt_len
            if count > room and sequences:
                break
            waiting.popleft()
            sequence.is_waiting = False
            sequences.append(sequence)
            counts.append(count)
            needed.append(sequence.num_states)
            room -= count
        batch.sampled = list(range(len(sequences)))
        self.prompt_tokens += self._max_tokens - room
        self._waiting_tokens -= self._max_tokens - room
        self.stats.steps += 1
        self._next_number += bool(sequences)
        return batch

    def advance(self, batch: Batch, *, chosen: bool = True) -> list[Sequence]:
        """Note that `batch` was launched: there is nothing to note."""
        return []

    def note_chosen(self, batch: Batch) -> None:
        """Nothing is chosen."""

    def land(self, sequences: list[Sequence]) -> None:
        """Nothing was chosen."""

    def finish(self, key: int) -> None:
        """Forget a text, wherever it stands."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None and sequence.is_waiting:
            self.waiting.remove(sequence)
            self._waiting_tokens -= sequence.prompt_len
