"""The work of one step. Never imports torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hasten.engine.encoder_input import EncoderInput
from hasten.engine.sequence import Sequence


class PromptRun(NamedTuple):
    """Tokens of a prompt that follow each other and whose logits are asked for."""

    sequence: Sequence
    first: int
    """Position of the first."""
    rows: range
    """Among the needed hidden states."""


@dataclass
class Batch:
    """Sequences with the number of tokens that each computes, and the block copies to make before."""

    number: int = 0
    """Of the step, counted from 0."""
    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)
    """How many of each sequence's last tokens need hidden states: all where its prompt's logits are asked for, or what
    is made of the text depends on all."""
    sampled: list[int] = field(default_factory=list)
    """Places in `sequences` of those that have no token left to compute after this step, and so get a next one."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    inputs: list[EncoderInput] = field(default_factory=list)
    """What the encoder computes, before the decoder computes its tokens."""

    def add(self, sequence: Sequence, count: int, copies: list[tuple[int, int]]) -> None:
        """Let `sequence` compute its next `count` tokens."""
        needed = 0
        if sequence.num_computed + count == sequence.length:
            self.sampled.append(len(self.sequences))
            needed = sequence.num_states
        if sequence.wants_prompt_logits:
            needed = count
        self.needed.append(needed)
        self.sequences.append(sequence)
        self.counts.append(count)
        if copies:
            self.copies += copies

    def prompt_runs(self) -> Iterator[PromptRun]:
        """The tokens whose prompt's logits are asked for; before the batch is noted as done."""
        end = 0
        for sequence, needed in zip(self.sequences, self.needed, strict=True):
            begin, end = end, end + needed
            if sequence.wants_prompt_logits:
                first = sequence.num_computed
                yield PromptRun(sequence, first, range(begin, begin + min(needed, sequence.prompt_len - first)))

    def mask_rows(self) -> Iterator[int]:
        """Row among the needed hidden states of each mask of a text; before the batch is noted as done."""
        end = 0
        for sequence, needed in zip(self.sequences, self.needed, strict=True):
            end += needed
            for position in sequence.masks:
                yield end - sequence.length + position

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.counts)
