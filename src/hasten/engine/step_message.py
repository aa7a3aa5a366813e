"""One step's work in numbers: all that a rank needs in order to compute it. Never imports torch.

Rank 0 makes it of the batch that it scheduled, and sends it to the other ranks, which know nothing of sequences. Its
size depends on the tokens that the step computes, and on the cache blocks that are new to it, not on the length of
sequences.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import cast

import numpy as np
from numpy.typing import NDArray

from hasten.engine.batch import Batch
from hasten.engine.encoder_input import EncoderInput
from hasten.engine.sequence import Sequence
from hasten.engine.text_scheduler import TextSequence

Numbers = NDArray[np.int32]
TableEdit = tuple[int, int, list[int]]
"""A row of the block tables, a column, and the blocks that stand in the row from that column on."""
BeamMove = tuple[int, int, int]
"""A beam's place among the sequences, that of beam 0 of its search, and the number of the beam that it continues.

-1 - i stands for number i of those that devices keep, which rank 0 does not know."""


class TableRows:
    """Rank 0's record of the block tables that all ranks have: whose each row is, and what stands in it."""

    def __init__(self, max_sequences: int) -> None:
        self._rows: dict[int, tuple[int, int, list[int]]] = {}
        """Sequence key -> row, version of the sequence's table, blocks that the row holds."""
        self._free = list(range(max_sequences))

    def assign_rows(self, sequences: list[Sequence | EncoderInput]) -> tuple[list[int], list[TableEdit]]:
        """The row of each of different sequences and encoders' inputs, and the edits that bring the rows up to date."""
        known, edits, rows = self._rows, [], []
        if len(self._free) < sum(sequence.key not in known for sequence in sequences):
            self._evict({sequence.key for sequence in sequences})
        for sequence in sequences:
            table, version = sequence.block_table, sequence.table_version
            entry = known.get(sequence.key) or (self._free.pop(), version, [])
            row, held_version, held = entry
            if held_version != version or len(held) < len(table) or not held:
                first = len(held) if held_version == version else _common(held, table)
                if first < len(table):
                    edits.append((row, first, table[first:]))
                held[first:] = table[first:]
                known[sequence.key] = (row, version, held)
            rows.append(row)
        return rows, edits

    def release(self, key: int) -> None:
        """Give the row of an ended sequence, if it has one, to others."""
        entry = self._rows.pop(key, None)
        if entry is not None:
            self._free.append(entry[0])

    def _evict(self, current: set[int]) -> None:
        for key in [key for key in self._rows if key not in current]:
            self.release(key)


def _common(held: list[int], table: list[int]) -> int:
    """How many blocks two tables have in common at their beginning."""
    pairs = enumerate(zip(held, table, strict=False))
    return next((index for index, (before, after) in pairs if before != after), min(len(held), len(table)))


@dataclass(frozen=True)
class StepMessage:
    """Shapes: t tokens of the flat batch, s sequences."""

    number: int
    """Of the step, counted from 0."""
    ids: list[int] | Numbers
    """[t]: token ids; -1 - i stands for number i of the chosen tokens that devices keep, which rank 0 does not know."""
    rows: list[int]
    """[s]: rows in the block tables; none of a step of texts, each of which is computed whole and leaves nothing."""
    starts: list[int]
    """[s]: tokens of each sequence that the cache holds already."""
    counts: list[int]
    """[s]: tokens of each sequence that this step computes."""
    needed: list[int]
    """[s]: how many of each sequence's last tokens, or first, need hidden states."""
    sampled: list[int]
    """Places among the sequences of those that get a next token."""
    prompt_rows: list[int]
    """Rows of the needed hidden states whose logits are asked for because they are a prompt's, or those of masks."""
    edits: list[TableEdit]
    """To make before the tables are read."""
    copies: list[tuple[int, int]]
    """Blocks, source and target, to copy before they are written."""
    positions: list[int] | Numbers
    """[t]: rows of the tokens in the model's table of positions; empty where those are their positions."""
    greedy: bool
    """Whether the most probable token is all that is asked for of any sequence."""
    needs_first: bool = False
    """Whether the needed tokens are each sequence's first ones, not its last."""
    moves: list[BeamMove] = field(default_factory=list)
    """Beams whose cache blocks are to follow the last choice before the step computes them."""
    num_chosen: int = 0
    """Tokens that the step chooses: of each sampled sequence one, of a search that begins one for each beam."""
    searches: bool = False
    """Whether beams are chosen, and so which ones they continue."""
    input_rows: list[int] = field(default_factory=list)
    """[s]: rows in the block tables of what the encoder left for each sequence; empty where there is no encoder."""
    input_lens: list[int] = field(default_factory=list)
    """[s]: tokens of that."""
    encoder_ids: list[int] = field(default_factory=list)
    """Token ids of the inputs that the encoder computes before, end to end."""
    encoder_rows: list[int] = field(default_factory=list)
    """Rows of these inputs in the block tables."""
    encoder_counts: list[int] = field(default_factory=list)
    """Tokens of each."""

    @classmethod
    def of(cls, batch: Batch, tables: TableRows) -> "StepMessage":
        """The work of a batch, before it is noted as done."""
        sequences, counts = batch.sequences, batch.counts
        given = [sequence.encoder_input for sequence in sequences if sequence.encoder_input is not None]
        own = list({each.key: each for each in given}.values())
        rows, edits = tables.assign_rows([*sequences, *own])
        row_of = {each.key: row for each, row in zip(own, rows[len(sequences) :], strict=True)}
        if len(sequences) == batch.num_tokens:
            ids = [-1 - s.pending_row if s.pending else s.token_ids[s.num_computed] for s in sequences]
        else:
            # A pending token is the last one of its sequence, and the only one that is left to compute.
            parts = (
                [-1 - s.pending_row] if s.pending else s.token_ids[s.num_computed : s.num_computed + n]
                for s, n in zip(sequences, counts, strict=True)
            )
            ids = list(chain.from_iterable(parts))
        sampled = [sequences[index] for index in batch.sampled]
        searches = any(sequence.beams is not None for sequence in sampled)
        return cls(
            number=batch.number,
            ids=ids,
            rows=rows[: len(sequences)],
            starts=[sequence.num_computed for sequence in sequences],
            counts=counts,
            needed=batch.needed,
            sampled=batch.sampled,
            prompt_rows=[*chain.from_iterable(run.rows for run in batch.prompt_runs()), *batch.mask_rows()],
            edits=edits,
            copies=batch.copies,
            positions=[],
            input_rows=[row_of[each.key] for each in given],
            input_lens=[len(each.token_ids) for each in given],
            encoder_ids=[token for each in batch.inputs for token in each.token_ids],
            encoder_rows=[row_of[each.key] for each in batch.inputs],
            encoder_counts=[len(each.token_ids) for each in batch.inputs],
            moves=list(_moves(sequences)),
            num_chosen=sum(len(sequence.successors) for sequence in sampled) if searches else len(sampled),
            searches=searches,
            greedy=all(sequence.is_plain and not sequence.forced_next for sequence in sampled),
        )

    @classmethod
    def of_texts(cls, batch: Batch, *, needs_first: bool = False) -> "StepMessage":
        """A step of texts, which are computed whole."""
        texts = cast("list[TextSequence]", batch.sequences)
        positions = [text.position_rows for text in texts]
        if all(own is None for own in positions):
            positions = []
        ranges = (np.arange(len(text.ids)) if own is None else own for own, text in zip(positions, texts, strict=False))
        return cls(
            number=batch.number,
            ids=np.concatenate([text.ids for text in texts]),
            rows=[],
            starts=[0] * len(texts),
            counts=batch.counts,
            needed=batch.needed,
            sampled=batch.sampled,
            prompt_rows=list(batch.mask_rows()),
            edits=[],
            copies=[],
            positions=np.concatenate(list(ranges)).astype(np.int32) if positions else [],
            greedy=True,
            needs_first=needs_first,
            num_chosen=len(texts),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return len(self.ids)

    @property
    def sampled_rows(self) -> list[int]:
        """Rows of the needed hidden states from which next tokens are chosen."""
        ends = list(accumulate(self.needed))
        return [ends[index] - 1 for index in self.sampled]

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

    def packed(self) -> Numbers:
        """The message as whole numbers: those that stand for themselves, the length of each list, and their content."""
        lists = [
            _listed(self.ids),
            self.rows,
            self.starts,
            self.counts,
            self.needed,
            self.sampled,
            self.prompt_rows,
            [number for row, first, blocks in self.edits for number in (row, first, len(blocks))],
            list(chain.from_iterable(blocks for _, _, blocks in self.edits)),
            list(chain.from_iterable(self.copies)),
            _listed(self.positions),
            list(chain.from_iterable(self.moves)),
            self.input_rows,
            self.input_lens,
            self.encoder_ids,
            self.encoder_rows,
            self.encoder_counts,
        ]
        single = (self.number, self.num_chosen, self.searches, self.greedy, self.needs_first)
        return np.array([*single, *map(len, lists), *chain.from_iterable(lists)], dtype=np.int32)

    @classmethod
    def unpacked(cls, numbers: Numbers) -> "StepMessage":
        """The message that `packed` made numbers of."""
        number, num_chosen, searches, greedy, needs_first, *lengths = numbers[: _SINGLE + _LISTS].tolist()
        content = iter(np.split(numbers, np.cumsum([_SINGLE + _LISTS, *lengths]))[1:])
        ids, rows, starts, counts, needed, sampled, prompt_rows, heads, blocks, copies, positions, moves, *encoder = (
            next(content).tolist() for _ in range(_LISTS)
        )
        input_rows, input_lens, encoder_ids, encoder_rows, encoder_counts = encoder
        return cls(
            number=number,
            ids=ids,
            rows=rows,
            starts=starts,
            counts=counts,
            needed=needed,
            sampled=sampled,
            prompt_rows=prompt_rows,
            edits=list(_edits(heads, blocks)),
            copies=list(zip(copies[::2], copies[1::2], strict=True)),
            positions=positions,
            moves=list(zip(moves[::3], moves[1::3], moves[2::3], strict=True)),
            num_chosen=num_chosen,
            searches=bool(searches),
            input_rows=input_rows,
            input_lens=input_lens,
            encoder_ids=encoder_ids,
            encoder_rows=encoder_rows,
            encoder_counts=encoder_counts,
            greedy=bool(greedy),
            needs_first=bool(needs_first),
        )


_SINGLE, _LISTS = 5, 17


def _listed(numbers: list[int] | Numbers) -> list[int]:
    return numbers if isinstance(numbers, list) else numbers.tolist()


def _moves(sequences: list[Sequence]) -> Iterable[BeamMove]:
    """The beams of a step that do not have the blocks of the beams which they continue; all of a search are in it."""
    for row, sequence in enumerate(sequences):
        if sequence.beams is None:
            continue
        if sequence.pending:
            yield row, row - sequence.index, -1 - sequence.pending_row
        elif sequence.parent is not None and sequence.parent != sequence.index:
            yield row, row - sequence.index, sequence.parent


def _edits(heads: list[int], blocks: list[int]) -> Iterable[TableEdit]:
    begin = 0
    for row, first, count in zip(heads[::3], heads[1::3], heads[2::3], strict=True):
        yield row, first, blocks[begin : begin + count]
        begin += count
