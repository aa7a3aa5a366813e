"""The work of one step. Never imports torch."""

from dataclasses import dataclass, field

from hasten.engine.sequence import Sequence


@dataclass
class Batch:
    """Sequences with the number of tokens that each computes, and the block copies to make before."""

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)
    """How many of each sequence's last tokens need hidden states: all where its prompt's logits are asked for."""
    sampled: list[int] = field(default_factory=list)
    """Places in `sequences` of those that have no token left to compute after this step, and so get a next one."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, count: int, copies: list[tuple[int, int]]) -> None:
        """Let `sequence` compute its next `count` tokens."""
        needed = 0
        if sequence.num_computed + count == sequence.length:
            self.sampled.append(len(self.sequences))
            needed = 1
        if sequence.wants_prompt_logits:
            needed = count
        self.needed.append(needed)
        self.sequences.append(sequence)
        self.counts.append(count)
        if copies:
            self.copies += copies

    def copy_rounds(self) -> list[list[tuple[int, int]]]:
        """The copies in groups to be done one after the other, each in any order: no group writes what it reads.

        A block that was copied away and then freed by a preemption may be the target of a later copy. No target is a
        source: its holder got it in this step, for itself alone.
        """
        rounds: list[list[tuple[int, int]]] = []
        read: set[int] = set()
        for source, target in self.copies:
            if not rounds or target in read:
                rounds.append([])
                read.clear()
            rounds[-1].append((source, target))
            read.add(source)
        return rounds

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.counts)
