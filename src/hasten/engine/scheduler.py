"""Who computes how many tokens in the next step. Never imports torch.

There are no phases: each sequence has tokens and `num_computed` of them are in the cache; a step lets sequences catch
up within a budget of tokens. Chunked prefill, prefix cache and preemption follow from that. All ranks run the same
scheduler over the same additions, so that they agree without talking.

Numbers of tokens matter here, not which they are: a step can be scheduled while the tokens of the one before are still
pending on the device.
"""

from collections import deque
from dataclasses import dataclass

from hasten.core.config import SchedulerConfig
from hasten.core.errors import CapacityError
from hasten.engine.batch import Batch
from hasten.engine.beam import Move
from hasten.engine.block_manager import BlockManager
from hasten.engine.sequence import Beams, Sequence


@dataclass
class SchedulerStats:
    """Counters since the start."""

    preemptions: int = 0
    steps: int = 0


class Scheduler:
    """Waiting and running sequences over one block manager."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        assert config.max_num_batched_tokens is not None, "the worker resolves the default"
        self.config = config
        self.blocks = blocks
        self._max_tokens = config.max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._sequences: dict[int, Sequence] = {}
        self._next_key = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others; beams are queued with their leader."""
        for member in sequence.unit:
            self._register_key(member)
        self.waiting.append(sequence)

    def get(self, key: int) -> Sequence | None:
        """The unfinished sequence with this key."""
        return self._sequences.get(key)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._sequences)

    def schedule(self) -> Batch:
        """Choose the next step's work and reserve its blocks; empty only when nothing is left to compute."""
        batch = Batch()
        budget = self._continue_running(batch)
        if not batch.preempted:
            self._admit_waiting(batch, budget)
        if not batch.sequences and (self.waiting or self.running):
            raise CapacityError(
                f"the key/value cache of {self.blocks.num_blocks} blocks cannot hold one sequence; "
                "lower max_model_len or give the cache more memory"
            )
        self.stats.steps += 1
        return batch

    def advance(self, batch: Batch) -> list[Sequence]:
        """Note that `batch` was launched; fork the siblings of prompts now whole; return these new sequences."""
        forked = []
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.num_computed += count
            self.blocks.register(sequence)
            if sequence.group_size > 1 and sequence.num_computed >= sequence.prompt_len:
                forked += self._fork(sequence)
            if sequence.beams is not None:
                self._spread(sequence.beams)
        self.waiting.extendleft(reversed(forked))
        self._note_pending(batch)
        return forked

    def _note_pending(self, batch: Batch) -> None:
        """Count the tokens that `batch` chooses. Who has all of its tokens runs no more and needs no blocks.

        Blocks may go to others at once: what those write is launched later, and so comes later on the device. A beam's
        token is known only when `move` says whose continuation it is.
        """
        any_complete = False
        for row, place in enumerate(batch.sampled):
            sequence = batch.sequences[place]
            if sequence.beams is not None:
                continue
            sequence.pending += 1
            sequence.pending_row = row
            if sequence.is_complete:
                self.blocks.free(sequence)
                any_complete = True
        if any_complete:
            self.running = [sequence for sequence in self.running if not sequence.is_complete]

    def move(self, moves: list[Move]) -> None:
        """Let the beams of one search go on, each as itself or as another; nothing where they have ended since."""
        if moves[0][0] not in self._sequences:
            return
        for key, parent_key, _ in moves:
            if key != parent_key:
                beam, parent = self._sequences[key], self._sequences[parent_key]
                beam.token_ids = parent.token_ids.copy()
                self.blocks.share(parent, beam, parent.num_computed)
        for key, _, token in moves:
            self._sequences[key].token_ids.append(token)

    def finish(self, key: int) -> None:
        """Forget a sequence and free its blocks, wherever it stands."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        self.blocks.free(sequence)
        for holders in (self.running, self.waiting):
            if sequence in holders:
                holders.remove(sequence)

    def _register_key(self, sequence: Sequence) -> None:
        sequence.key = self._next_key
        self._sequences[sequence.key] = sequence
        self._next_key += 1

    def _fork(self, parent: Sequence) -> list[Sequence]:
        children = []
        for index in range(1, parent.group_size):
            child = parent.fork(index)
            self.blocks.fork(parent, child)
            self._register_key(child)
            children.append(child)
        parent.group_size = 1
        return children

    def _continue_running(self, batch: Batch) -> int:
        budget = self._max_tokens
        place = 0
        while place < len(self.running) and budget > 0:
            sequence = self.running[place]
            if sequence.beams is not None:
                budget, place = self._continue_beams(sequence.beams, place, batch, budget)
                continue
            count = min(sequence.length - sequence.num_computed, budget)
            copies = self.blocks.reserve(sequence, count)
            if copies is None:
                copies = self._preempt_for(sequence, count, batch)
            if copies is None:
                continue
            batch.add(sequence, count, copies)
            budget -= count
            place += 1
        return budget

    def _continue_beams(self, beams: Beams, place: int, batch: Batch, budget: int) -> tuple[int, int]:
        """The budget that beams running from `place` on leave, and the place behind them.

        They come into the batch together or, having given way themselves, not at all.
        """
        work, left = [], budget
        for beam in beams.members:
            count = min(beam.uncomputed, left)
            if count == 0:
                continue
            copies = self.blocks.reserve(beam, count)
            if copies is None:
                copies = self._preempt_for(beam, count, batch)
            if copies is None:
                return budget, place
            work.append((beam, count, copies))
            left -= count
        for beam, count, copies in work:
            batch.add(beam, count, copies)
        return left, place + len(beams.members)

    def _spread(self, beams: Beams) -> None:
        """Share the leader's blocks with the other beams, as soon as it has all that they have in common."""
        leader = beams.leader
        if not beams.scattered or leader.num_computed < beams.trunk:
            return
        beams.scattered = False
        for beam in beams.members[1:]:
            self.blocks.share(leader, beam, beams.trunk)

    def _preempt_for(self, sequence: Sequence, count: int, batch: Batch) -> list[tuple[int, int]] | None:
        """Take blocks from others until the reservation succeeds; None if `sequence` itself had to give way."""
        copies = None
        while copies is None:
            victim = next((waiting for waiting in reversed(self.waiting) if waiting.block_table), None)
            if victim is None:
                victim = self._preempt_last(batch)
            for member in victim.unit:
                self.blocks.free(member)
            if sequence in victim.unit:
                return None
            copies = self.blocks.reserve(sequence, count)
        return copies

    def _preempt_last(self, batch: Batch) -> Sequence:
        """Send the last one running back to the queue; beams go there together, and their leader stands for them."""
        last = self.running[-1]
        victim = last if last.beams is None else last.beams.leader
        del self.running[-len(victim.unit) :]
        self.waiting.appendleft(victim)
        batch.preempted.append(victim)
        self.stats.preemptions += 1
        if victim.beams is not None:
            victim.beams.scatter()
        return victim

    def _admit_waiting(self, batch: Batch, budget: int) -> None:
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            if len(self.running) + len(sequence.unit) > self.config.max_num_seqs:
                return
            if not sequence.block_table:
                self.blocks.share_prefix(sequence)
            count = min(sequence.length - sequence.num_computed, budget)
            copies = self.blocks.reserve(sequence, count)
            if copies is None:
                if not self.running:
                    self._release_waiting()
                    copies = self.blocks.reserve(sequence, count)
                if copies is None:
                    return
            self.waiting.popleft()
            self.running += sequence.unit
            batch.add(sequence, count, copies)
            budget -= count

    def _release_waiting(self) -> None:
        """Take back the blocks of waiting sequences but the first; nothing runs that could free any."""
        for sequence in list(self.waiting)[1:]:
            if sequence.block_table:
                self.blocks.free(sequence)
