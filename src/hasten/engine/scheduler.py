"""Who computes how many tokens in the next step. Never imports torch.

There are no phases: each sequence has tokens and `num_computed` of them are in the cache; a step lets sequences catch
up within a budget of tokens. Chunked prefill, prefix cache and preemption follow from that. Rank 0 alone has a
scheduler.

Decodes come first. What is left of the budget, or less (`pacing.py`), goes to prompts in the order of their `due`.

Numbers of tokens matter here, not which they are: a step can be scheduled while the tokens of the one before are still
pending on the device.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from hasten.core.config import SchedulerConfig
from hasten.core.errors import CapacityError
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.sequence import Beams, Sequence

_STEPS_PER_STAGE = 8
"""Steps of a pipeline that the waiting prompts are divided into at least, for each stage."""


@dataclass
class SchedulerStats:
    """Counters since the start."""

    preemptions: int = 0
    steps: int = 0


class Scheduler:
    """Waiting and running sequences over one block manager."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, stages: int = 1, least_tokens: int = 1) -> None:
        """As many steps as `stages` are computed at a time; prompts are cut for them to `least_tokens` at least."""
        assert config.max_num_batched_tokens is not None, "the worker resolves the default"
        self.config = config
        self.blocks = blocks
        self._stages, self._least_tokens = stages, least_tokens
        self._max_tokens = config.max_num_batched_tokens
        self._max_joint = -(-config.max_num_seqs // stages)
        """Sequences of a step that prompts may join: those that run are dealt to as many steps as there are stages."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._sequences: dict[int, Sequence] = {}
        self._next_key = 0
        self._next_number = 0
        self.prompt_tokens = 0
        """Computed since the start."""

    def go_on_counting(self, before: "Scheduler") -> None:
        """Let counters go on from those of a scheduler in whose place this one stands."""
        self.stats = before.stats
        self.blocks.prefix_queries = before.blocks.prefix_queries
        self.blocks.prefix_hits = before.blocks.prefix_hits

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those whose `due` is not later; beams are queued with their leader."""
        for member in sequence.unit:
            self._register_key(member)
        if sequence.encoder_input is not None:
            sequence.encoder_input.key = self._new_key()
        index = len(self.waiting)
        while index > 0 and self.waiting[index - 1].due > sequence.due:
            index -= 1
        self.waiting.insert(index, sequence)
        sequence.is_waiting = True

    def begin_longest_first(self) -> None:
        """Let those that wait begin in the order of their greatest output, as far as their `due` leaves it open.

        For requests that are wanted all together: a step of few sequences at the end takes almost as long as one of
        many before. Whoever has no `max_tokens` may become longest.
        """
        self.waiting = deque(sorted(self.waiting, key=_longest_first))

    def get(self, key: int) -> Sequence | None:
        """The unfinished sequence with this key."""
        return self._sequences.get(key)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._sequences)

    def prompts(self) -> Iterator[Sequence]:
        """The sequences with prompts to compute: those that have begun, then those that wait."""
        yield from (sequence for sequence in self.running if sequence.is_prefilling)
        yield from self.waiting

    def schedule(self, prompt_tokens: int | None = None) -> Batch:
        """Choose the next step's work and reserve its blocks.

        At most `prompt_tokens`, if given, are computed of prompts. Empty when nothing is left to compute or, with
        several stages, before tokens are known that steps under way choose.
        """
        batch = Batch(self._next_number)
        budget = min(self._continue_decodes(batch, self._micro_batch(rested=True)), self._prompt_part())
        self._compute_prompts(batch, budget if prompt_tokens is None else min(budget, prompt_tokens))
        if not batch.sequences and self._stages > 1:
            self._continue_decodes(batch, self._micro_batch(rested=False))
        if not batch.sequences and (self.waiting or self.running) and not self._is_waiting_for_tokens:
            raise CapacityError(
                f"the key/value cache of {self.blocks.num_blocks} blocks cannot hold one sequence; "
                "lower max_model_len or give the cache more memory"
            )
        self.stats.steps += 1
        self._next_number += bool(batch.sequences)
        return batch

    @property
    def _is_waiting_for_tokens(self) -> bool:
        """Whether steps under way choose tokens of sequences that run or were preempted meanwhile."""
        return any(member.in_flight for sequence in (*self.running, *self.waiting) for member in sequence.unit)

    def advance(self, batch: Batch, *, chosen: bool = True) -> list[Sequence]:
        """Note that `batch` was launched; fork the siblings of prompts now whole; return these new sequences.

        Unless its next tokens are `chosen` as part of that, `note_chosen` is to follow.
        """
        forked = []
        for given in batch.inputs:
            self.blocks.register_input(given)
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.num_computed += count
            sequence.parent = None
            self.blocks.register(sequence)
            if sequence.group_size > 1 and sequence.num_computed >= sequence.prompt_len:
                forked += self._fork(sequence)
            if sequence.beams is not None:
                self._spread(sequence.beams)
            elif sequence.group_size == 1:
                self.blocks.release_unseen(sequence)
        self.waiting.extendleft(reversed(forked))
        for sequence in forked:
            sequence.is_waiting = True
        if self._stages > 1:
            for index in batch.sampled:
                batch.sequences[index].in_flight += 1
                batch.sequences[index].last_step = batch.number
        if chosen:
            self.note_chosen(batch)
        return forked

    def land(self, sequences: list[Sequence]) -> None:
        """Note that the tokens which one step chose for these sequences are known."""
        if self._stages > 1:
            for sequence in sequences:
                sequence.in_flight -= 1

    def note_chosen(self, batch: Batch) -> None:
        """Count the tokens that `batch` chooses. Who has all of its tokens runs no more and needs no blocks.

        Blocks may go to others at once: what those write is launched later, and so comes later on the device. With
        several stages a beam's token counts once `move` says whose continuation it is, which all stages have to know.
        """
        any_complete = False
        row = batch.number % self._stages * self.config.max_num_seqs
        for index in batch.sampled:
            for sequence in batch.sequences[index].successors:
                if not sequence.pooling and (sequence.beams is None or self._stages == 1):
                    sequence.pending += 1
                    sequence.pending_row = row
                row += 1
                if sequence.is_complete:
                    self.blocks.free(sequence)
                    any_complete = True
        if any_complete:
            self.running = [sequence for sequence in self.running if not sequence.is_complete]

    def move(self, leader_key: int, parents: list[int], tokens: list[int]) -> None:
        """Let each beam of a search go on with a token, as the beam of a number; nothing where they have ended.

        Their full blocks change hands here. What is in the blocks behind them follows on the devices, in the next step.
        """
        leader = self._sequences.get(leader_key)
        if leader is None:
            return
        assert leader.beams is not None
        members, known = leader.beams.members, len(leader.token_ids)
        for number, (beam, parent) in enumerate(zip(members, parents, strict=True)):
            if parent != number:
                beam.token_ids = members[parent].token_ids.copy()
                if beam.block_table:
                    self.blocks.share(members[parent], beam, known // self.blocks.block_size)
            if beam.num_computed == known:
                beam.parent = parent  # a step that was launched meanwhile has followed already
        for beam, token in zip(members, tokens, strict=True):
            beam.append(token)
        if leader.beams.scattered:
            leader.beams.scatter()

    def finish(self, key: int) -> None:
        """Forget a sequence and free its blocks, wherever it stands."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        self.blocks.free(sequence)
        if sequence.is_waiting:  # they may be very many, so no other is looked for among them
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)

    def _register_key(self, sequence: Sequence) -> None:
        sequence.key = self._new_key()
        self._sequences[sequence.key] = sequence

    def _new_key(self) -> int:
        self._next_key += 1
        return self._next_key - 1

    def _fork(self, parent: Sequence) -> list[Sequence]:
        children = []
        for index in range(1, parent.group_size):
            child = parent.fork(index)
            child.due = 0
            self.blocks.fork(parent, child)
            self.blocks.hold_input(child)
            self._register_key(child)
            children.append(child)
        parent.group_size = 1
        return children

    def _prompt_part(self) -> int:
        """Most prompt tokens of a step: with several stages, a small part of those that wait.

        While the first step of all is in one stage, those behind it stand idle, and while the last is, those before it.
        """
        if self._stages == 1:
            return self._max_tokens
        parts, waiting = _STEPS_PER_STAGE * self._stages, 0
        for sequence in self.prompts():
            waiting += sequence.uncomputed + sequence.uncomputed_input
            if waiting >= parts * self._max_tokens:
                return self._max_tokens
        return max(self._least_tokens, -(-waiting // parts))

    def _micro_batch(self, *, rested: bool) -> set[int] | None:
        """Keys of those that may decode in the next step, of beams the leader's; None: all that can.

        With several stages a step takes its part of the running sequences, those first whose last step is longest ago.
        `rested`: only those whose last step has left the pipeline, so that no stage waits for the next one's tokens.
        """
        if self._stages == 1:
            return None
        decodes = [s for s in self.running if s.unit[0] is s and not s.is_prefilling]
        ready = [s for s in decodes if self._is_ready(s)]
        if rested:
            ready = [s for s in ready if s.last_step + self._stages <= self._next_number]
        ready.sort(key=_last_step)
        return {sequence.key for sequence in ready[: -(-len(decodes) // self._stages)]}

    def _is_ready(self, sequence: Sequence) -> bool:
        """Whether a running sequence, or one that comes and goes with it, can compute a token now.

        Without overlapped steps its last token must be known; with them the device has it.
        """
        if not self.config.overlap_steps and sequence.in_flight:
            return False
        return any(member.uncomputed for member in sequence.unit)

    def _continue_decodes(self, batch: Batch, chosen: set[int] | None) -> int:
        """Let the running sequences of these keys, but the prefilling ones, compute what they lack; the budget left."""
        budget = self._max_tokens - batch.num_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            if sequence.is_prefilling or (chosen is not None and sequence.key not in chosen):
                index += len(sequence.unit)
            elif sequence.beams is not None:
                budget, index = self._continue_beams(sequence.beams, index, batch, budget)
            elif (copies := self._reserve(sequence, 1, batch)) is not None:
                batch.add(sequence, 1, copies)
                budget -= 1
                index += 1
        return budget

    def _reserve(self, sequence: Sequence, count: int, batch: Batch) -> list[tuple[int, int]] | None:
        """Reserve blocks of a running sequence, others' if none are free; None if it had to give way itself."""
        copies = self.blocks.reserve(sequence, count)
        return self._preempt_for(sequence, count, batch) if copies is None else copies

    def _continue_beams(self, beams: Beams, index: int, batch: Batch, budget: int) -> tuple[int, int]:
        """The budget that beams running from `index` on leave, and the index behind them.

        They come into the batch together or, having given way themselves, not at all.
        """
        lacking, work, left = [beam.uncomputed for beam in beams.members], [], budget
        # they reach their last tokens in the same step, all of them
        kept_back = 1 if sum(lacking) > budget else 0
        for beam, most in zip(beams.members, lacking, strict=True):
            count = min(most - kept_back, left)
            if count <= 0:
                continue
            copies = self._reserve(beam, count, batch)
            if copies is None:
                return budget, index
            work.append((beam, count, copies))
            left -= count
        for beam, count, copies in work:
            batch.add(beam, count, copies)
        return left, index + len(beams.members)

    def _compute_prompts(self, batch: Batch, budget: int) -> None:
        """Let prompts, begun and waiting, compute up to `budget` tokens in the order of their `due`."""
        begun = deque(sorted((s for s in self.running if s.is_prefilling), key=_due))
        may_admit, computed = not batch.preempted, 0
        while budget > 0 and (begun or may_admit):
            if begun and not (may_admit and self.waiting and self.waiting[0].due < begun[0].due):
                count = self._continue_prompt(begun.popleft(), batch, budget)
                may_admit = may_admit and count is not None and not batch.preempted
            else:
                count = self._admit(batch, budget, is_first=not computed)
                may_admit = count is not None
            budget -= count or 0
            computed += count or 0
        self.prompt_tokens += computed

    def _continue_prompt(self, sequence: Sequence, batch: Batch, budget: int) -> int | None:
        """Let a running prompt compute more of its tokens: their number; None if its blocks have to wait for others'.

        It takes blocks from none that is in the batch, and has to give way itself only if it came last.
        """
        if sequence in batch.preempted:
            return None
        count = min(sequence.uncomputed, budget)
        copies = self.blocks.reserve(sequence, count)
        if copies is None and (not batch.sequences or self.running[-1] in sequence.unit):
            copies = self._preempt_for(sequence, count, batch)
        if copies is None:
            return None
        batch.add(sequence, count, copies)
        return count

    def _spread(self, beams: Beams) -> None:
        """Share the leader's full blocks with the other beams, as soon as it has all that they have in common.

        What is behind them follows the first choice on the devices; of beams that were preempted each computes its own.
        """
        leader = beams.leader
        if not beams.scattered or leader.num_computed < beams.trunk:
            return
        beams.scattered = False
        whole = beams.trunk // self.blocks.block_size
        for beam in beams.members[1:]:
            self.blocks.share(leader, beam, whole)
            beam.num_computed = beams.trunk if leader.length == beams.trunk else whole * self.blocks.block_size

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
        victim.due = 0
        self.waiting.appendleft(victim)
        victim.is_waiting = True
        batch.preempted.append(victim)
        self.stats.preemptions += 1
        if victim.beams is not None:
            victim.beams.scatter()
        return victim

    def _admit(self, batch: Batch, budget: int, *, is_first: bool) -> int | None:
        """Let the first waiting sequence run: its tokens in this step; None where there is none or no room for it.

        What is computed whole, a text or an encoder's input, may exceed the budget if it `is_first`, before all other
        prompts of the step.
        """
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        if len(self.running) + len(sequence.unit) > self.config.max_num_seqs:
            return None
        if batch.sequences and len(batch.sequences) + len(sequence.unit) > self._max_joint:
            return None
        if any(member.in_flight for member in sequence.unit):
            return None  # it was preempted, and would choose a token again that is not known yet
        found = self._reserve_first(sequence, budget, is_first=is_first)
        if found is None and not self.running:
            self._release_waiting()
            found = self._reserve_first(sequence, budget, is_first=is_first)
        if found is None:
            return None
        self.waiting.popleft()
        sequence.is_waiting = False
        self.running += sequence.unit
        if not sequence.begun:
            sequence.begun, sequence.num_cached = time.monotonic(), sequence.num_computed
        count, copies = found
        batch.add(sequence, count, copies)
        whole = sequence.uncomputed_input
        if whole:
            assert sequence.encoder_input is not None
            sequence.encoder_input.is_computed = True
            batch.inputs.append(sequence.encoder_input)
        return count + whole

    def _reserve_first(
        self, sequence: Sequence, budget: int, *, is_first: bool
    ) -> tuple[int, list[tuple[int, int]]] | None:
        """Blocks for the first tokens of a waiting sequence: how many, and copies to make; None if they do not fit."""
        if not self.blocks.hold_input(sequence):
            return None
        if not sequence.block_table:
            self.blocks.share_prefix(sequence)
        count, whole = sequence.uncomputed, sequence.uncomputed_input
        if sequence.pooling:
            count, whole = 0, count
        copies = None
        if whole <= budget or is_first:
            # of what is not computed whole, a part will do
            count = whole if sequence.pooling else min(count, max(1, budget - whole))
            copies = self.blocks.reserve(sequence, count)
        if copies is None:
            self.blocks.release_input(sequence)
            return None
        return count, copies

    def _release_waiting(self) -> None:
        """Take back the blocks of waiting sequences but the first; nothing runs that could free any."""
        for sequence in list(self.waiting)[1:]:
            if sequence.block_table:
                self.blocks.free(sequence)


def _due(sequence: Sequence) -> int:
    return sequence.due


def _longest_first(sequence: Sequence) -> tuple[int, float]:
    unlimited = sequence.params.max_tokens is None
    return sequence.due, -math.inf if unlimited else sequence.prompt_len - sequence.max_length


def _last_step(sequence: Sequence) -> int:
    return sequence.last_step
