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

    def catches_up(self, place: int) -> bool:
        """Whether the sequence at this place has no token left to compute after this step, and so gets a next one."""
        sequence = self.sequences[place]
        return sequence.num_computed + self.counts[place] == len(sequence.token_ids)

    def sampled(self) -> list[int]:
        """Places in `sequences` of those that get a next token."""
        return [place for place in range(len(self.sequences)) if self.catches_up(place)]

    def needed(self) -> list[int]:
        """How many of each sequence's last tokens need hidden states: all where its prompt's logits are asked for."""
        return [
            count if sequence.wants_prompt_logits else int(self.catches_up(place))
            for place, (sequence, count) in enumerate(zip(self.sequences, self.counts, strict=True))
        ]
