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
        catches_up = sequence.num_computed + count == sequence.length
        if catches_up:
            self.sampled.append(len(self.sequences))
        self.needed.append(count if sequence.wants_prompt_logits else int(catches_up))
        self.sequences.append(sequence)
        self.counts.append(count)
        self.copies += copies

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.counts)
