"""The work of one step. Never imports torch."""

from dataclasses import dataclass, field

from hasten.engine.sequence import Sequence


@dataclass
class Batch:
    """Sequences with the number of tokens that each computes, and the block copies to make before."""

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, count: int, copies: list[tuple[int, int]]) -> None:
        """Let `sequence` compute its next `count` tokens."""
        self.sequences.append(sequence)
        self.counts.append(count)
        self.copies += copies

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.counts)

    def sampled(self) -> list[int]:
        """Places in `sequences` of those that catch up with this step, and so get a next token."""
        return [
            place
            for place, (sequence, count) in enumerate(zip(self.sequences, self.counts, strict=True))
            if sequence.num_computed + count == len(sequence.token_ids)
        ]
