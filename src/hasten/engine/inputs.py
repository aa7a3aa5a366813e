"""What a batch looks like to the device: numbers worked out on the host, sent in one copy a step.

Shapes: t tokens of the flat batch, s sequences, b blocks of the longest.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from hasten.engine.batch import Batch
from hasten.engine.sequence import Sequence
from hasten.ops import plan
from hasten.ops.meta import AttentionMeta
from hasten.ops.plan import AttentionPlan, Integers, Planner
from hasten.ops.transfer import send

Arrays = dict[str, Integers]


class BlockTables:
    """The block tables of running sequences as one array, so that a step copies only what is new."""

    def __init__(self, max_sequences: int, max_blocks: int) -> None:
        self.array = np.zeros((max_sequences, max_blocks), dtype=np.int32)
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self._rows: dict[int, tuple[int, int, int]] = {}
        """Sequence key -> row, version of the table it holds, blocks it holds."""
        self._free = list(range(len(self.array)))

    def rows(self, sequences: list[Sequence]) -> list[int]:
        """The row of each sequence, brought up to date."""
        known = self._rows
        if len(self._free) < sum(s.key not in known for s in sequences):
            current = {s.key for s in sequences}
            for key in [key for key in known if key not in current]:
                self._free.append(known.pop(key)[0])
        rows = []
        for sequence in sequences:
            table = sequence.block_table
            row, version, filled = known.get(sequence.key) or (self._free.pop(), -1, 0)
            if version != sequence.table_version or filled < len(table):
                filled = filled if version == sequence.table_version else 0
                self.array[row, filled : len(table)] = table[filled:]
                known[sequence.key] = (row, sequence.table_version, len(table))
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch on the device."""

    ids: Tensor
    """[t]: token ids; -1 - i stands for token i of those that the step before chose, which only the device knows."""
    positions: Tensor
    """[t]"""
    meta: AttentionMeta
    any_pending: bool
    """Whether any id is negative."""


@dataclass(frozen=True)
class _Work:
    """Sequences of a batch, or of a part of one, in numbers."""

    counts: Integers
    """[s]: tokens of each sequence."""
    kv_lens: Integers
    """[s]: tokens that attention sees."""
    table_rows: Integers
    """[s]: rows in the block tables."""
    first_rows: Integers
    """[s]: where each sequence's tokens begin among the queries of the whole batch."""
    slots: Integers
    """[t]"""


class Inputs:
    """Makes the device's view of batches."""

    def __init__(self, tables: BlockTables, block_size: int, planner: Planner | None, device: torch.device) -> None:
        self.tables = tables
        self.block_size = block_size
        self.planner = planner
        """Divides the work where the device's kernels want that."""
        self.device = device

    def tokens(self, batch: Batch, needed: list[int]) -> Tokens:
        """A batch of any kind; the part of `needed` tokens is told apart where not all are."""
        ids, positions, work = self._numbers(batch)
        return self.sent(ids, positions, work, np.array(needed))

    def sent(self, ids: Integers, positions: Integers, work: _Work, needed: Integers) -> Tokens:
        """The tokens of sequences whose last `needed` ones need hidden states."""
        arrays = {"ids": ids, "positions": positions, **self._arrays(work, "")}
        part = None
        if needed.sum() < len(ids):
            part, rows = self._part(work, needed)
            arrays |= {"output.indices": rows, **self._arrays(part, "output.")}
        tensors = send(arrays, self.device)
        output_part = None if part is None else self._meta(part, tensors, "output.", None)
        meta = self._meta(work, tensors, "", output_part)
        return Tokens(tensors["ids"], tensors["positions"], meta, bool((ids < 0).any()))

    def _numbers(self, batch: Batch) -> tuple[Integers, Integers, _Work]:
        sequences, counts = batch.sequences, np.array(batch.counts)
        starts = np.array([sequence.num_computed for sequence in sequences])
        rows = np.array(self.tables.rows(sequences))
        if len(sequences) == batch.num_tokens:
            ids = np.array(
                [-1 - s.pending_row if s.pending else s.token_ids[s.num_computed] for s in sequences], dtype=np.int64
            )
            positions, token_rows, first_rows = starts, rows, np.arange(len(sequences))
        else:
            work = zip(sequences, batch.counts, strict=True)
            # A pending token is the last one of its sequence, and the only one that is left to compute.
            parts = (
                [-1 - s.pending_row] if s.pending else s.token_ids[s.num_computed : s.num_computed + n] for s, n in work
            )
            ids = np.fromiter(chain.from_iterable(parts), dtype=np.int64)
            first_rows = np.cumsum(counts) - counts
            positions = np.arange(len(ids)) - np.repeat(first_rows - starts, counts)
            token_rows = np.repeat(rows, counts)
        slots = self.tables.array[token_rows, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        return ids, positions, _Work(counts, starts + counts, rows, first_rows, slots)

    def _part(self, work: _Work, needed: Integers) -> tuple[_Work, Integers]:
        """The last `needed` tokens of each sequence, and their rows in the batch."""
        chosen = needed.nonzero()[0]
        counts = needed[chosen]
        first_rows = (work.first_rows + work.counts)[chosen] - counts
        rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first_rows, counts)
        part = _Work(counts, work.kv_lens[chosen], work.table_rows[chosen], first_rows, work.slots[rows])
        return part, rows

    def _arrays(self, work: _Work, prefix: str) -> Arrays:
        width = -(-int(work.kv_lens.max(initial=1)) // self.block_size)
        arrays: Arrays = {
            "slots": work.slots,
            "query_start": np.concatenate([[0], np.cumsum(work.counts)]).astype(np.int32),
            "seq_lens": work.kv_lens.astype(np.int32),
            "tables": self.tables.array[work.table_rows, :width],
        }
        if self.planner is not None:
            arrays |= self.planner.plan(work.first_rows, work.counts, work.kv_lens)
        return {prefix + name: array for name, array in arrays.items()}

    def _meta(
        self, work: _Work, tensors: dict[str, Tensor], prefix: str, output_part: AttentionMeta | None
    ) -> AttentionMeta:
        divided = None
        if self.planner is not None:
            divided = AttentionPlan(tensors.get(f"{prefix}tiles"), tensors.get(f"{prefix}splits"))
        return AttentionMeta(
            query_start=tensors[f"{prefix}query_start"],
            seq_lens=tensors[f"{prefix}seq_lens"],
            block_tables=tensors[f"{prefix}tables"],
            slot_mapping=tensors[f"{prefix}slots"],
            query_lens=work.counts.tolist(),
            kv_lens=work.kv_lens.tolist(),
            output_indices=tensors.get(f"{prefix}indices"),
            plan=divided,
            output_part=output_part,
        )

    def warmup_tokens(self, num_tokens: int, num_sequences: int) -> Tokens:
        """Tokens of no sequence, to run the model without effect: nothing is stored, and what is read is any memory."""
        counts = np.full(num_sequences, num_tokens // num_sequences)
        counts[0] += num_tokens - counts.sum()
        zeros = np.zeros(num_tokens, dtype=np.int64)
        nothing = np.zeros(num_sequences, dtype=np.int64)
        # The keys of a sequence all lie in the first blocks, however long it is.
        kv_lens = np.minimum(counts, self.tables.array.shape[1] * self.block_size)
        work = _Work(counts, kv_lens, nothing, np.cumsum(counts) - counts, zeros - 1)
        return self.sent(zeros, zeros, work, np.ones(num_sequences, dtype=np.int64))

    def decode_layout(self, size: int) -> "DecodeLayout":
        """Where the numbers of a step of up to `size` single tokens stand in one tensor."""
        assert self.planner is not None, "graphs of steps are a GPU's"
        return DecodeLayout(size, self.planner.max_num_splits(size), self.tables.array.shape[1])

    def decode_numbers(self, batch: Batch, layout: "DecodeLayout") -> Tensor:
        """A batch of single tokens by its layout, on the host."""
        ids, positions, work = self._numbers(batch)
        count, width = len(ids), -(-int(work.kv_lens.max()) // self.block_size)
        splits = plan.kv_splits(work.first_rows, work.first_rows, work.first_rows, work.kv_lens, layout.splits)
        host = torch.empty(layout.total, dtype=torch.int32, pin_memory=True)
        views = {name: view.numpy() for name, view in layout.views(host).items()}
        for name, array in (("ids", ids), ("positions", positions), ("slots", work.slots), ("seq_lens", work.kv_lens)):
            views[name][:count] = array
            views[name][count:] = -1 if name == "slots" else 0
        views["splits"][: len(splits)] = splits
        views["splits"][len(splits) :] = [-1, 0, 0, 0, 0, 0, 0, 1]
        views["tables"][:count, :width] = self.tables.array[work.table_rows, :width]
        return host


@dataclass(frozen=True)
class DecodeLayout:
    """Sections of the one tensor that a step of single tokens sends to the device; each begins at a whole line."""

    size: int
    splits: int
    blocks: int

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = dict.fromkeys(("ids", "positions", "slots", "seq_lens"), (self.size,))
        return {**tokens, "splits": (self.splits, plan.SPLIT_COLUMNS), "tables": (self.size, self.blocks)}

    @property
    def total(self) -> int:
        """Numbers of all sections."""
        return sum(_padded(shape) for shape in self._shapes.values())

    def views(self, whole: Tensor) -> dict[str, Tensor]:
        """The sections of a tensor of `total` numbers."""
        made, start = {}, 0
        for name, shape in self._shapes.items():
            made[name] = whole[start : start + int(np.prod(shape))].view(shape)
            start += _padded(shape)
        return made

    def tokens(self, whole: Tensor) -> Tokens:
        """What the model takes, as views of a tensor on the device."""
        views = self.views(whole)
        meta = AttentionMeta(
            query_start=views["ids"],
            seq_lens=views["seq_lens"],
            block_tables=views["tables"],
            slot_mapping=views["slots"],
            query_lens=[1] * self.size,
            kv_lens=[],
            plan=AttentionPlan(None, views["splits"]),
        )
        return Tokens(views["ids"], views["positions"], meta, any_pending=True)


def _padded(shape: tuple[int, ...]) -> int:
    """Numbers of a section with what fills up its last line of 128 bytes."""
    return -(-int(np.prod(shape)) // 32) * 32
