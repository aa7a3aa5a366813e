"""What a batch looks like to the device: numbers worked out on the host, sent in one copy a step.

A `StepMessage` becomes a `Step`, its numbers by meaning; `Inputs.arrays` names what of them the device gets. Steps that
are launched kernel by kernel send arrays of just their size, those in graphs are padded and fill sections of a fixed
one.
Shapes: t tokens of the flat batch, s sequences, b blocks of the longest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hasten.engine.step_message import StepMessage, TableEdit
from hasten.ops import plan
from hasten.ops.meta import AttentionMeta
from hasten.ops.plan import AttentionPlan, Integers, Planner
from hasten.ops.transfer import Sections, send

Arrays = dict[str, Integers]


class BlockTables:
    """The block tables of running sequences as one array, of which a step changes only what is new."""

    def __init__(self, max_sequences: int, max_blocks: int) -> None:
        self.array = np.zeros((max_sequences, max_blocks), dtype=np.int32)

    def apply(self, edits: list[TableEdit]) -> None:
        """Bring rows up to date."""
        for row, first, blocks in edits:
            self.array[row, first : first + len(blocks)] = blocks


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


class _Work(NamedTuple):
    """Sequences of a step, or of a part of it, in numbers."""

    sequences: Integers
    """[s]: rows in the block tables of the step."""
    first_rows: Integers
    """[s]: where each sequence's tokens begin among the queries of the whole step."""
    counts: Integers
    """[s]: tokens of each sequence."""
    kv_lens: Integers
    """[s]: tokens that attention sees."""

    def last(self, needed: Integers) -> "_Work":
        """The last `needed` tokens of each sequence."""
        chosen = needed.nonzero()[0]
        counts = needed[chosen]
        first_rows = (self.first_rows + self.counts)[chosen] - counts
        return _Work(self.sequences[chosen], first_rows, counts, self.kv_lens[chosen])

    @property
    def rows(self) -> Integers:
        """[t]: the row of each token among the queries of the whole step."""
        starts = np.cumsum(self.counts) - self.counts
        return np.arange(self.counts.sum()) - np.repeat(starts - self.first_rows, self.counts)

    def and_padding(self, counts: Integers, first_rows: Integers) -> "_Work":
        """With so many tokens more, which belong to no sequence and see no keys, from these rows on."""
        nothing = np.zeros_like(counts)
        return _Work(*map(np.concatenate, zip(self, _Work(nothing, first_rows, counts, nothing), strict=True)))


@dataclass(frozen=True)
class Step:
    """A batch in numbers, on the host."""

    ids: Integers
    """[t]: as in `Tokens`."""
    positions: Integers
    """[t]"""
    slots: Integers
    """[t]: cache slots; -1 to store nothing."""
    tables: Integers
    """[s, b]"""
    work: _Work
    part: _Work | None
    """The tokens whose hidden states are needed, where not all are."""

    def padded(self, tokens: int, outputs: int | None) -> "Step":
        """This step with tokens that belong to no sequence: `tokens` in all, of which `outputs` are needed.

        Without `outputs`, which is for steps without a part, each of them is for itself, as single tokens are.
        """
        end, more = len(self.ids), tokens - len(self.ids)
        counts, rows = np.ones(more, dtype=np.int64), np.arange(end, tokens)
        part = self.part
        if outputs is not None:
            assert part is not None
            counts, rows = np.full(min(more, 1), more), rows[:1]
            lacking = np.ones(outputs - int(part.counts.sum()), dtype=np.int64)
            part = part.and_padding(lacking, np.zeros_like(lacking))
        return Step(
            ids=np.pad(self.ids, (0, more)),
            positions=np.pad(self.positions, (0, more)),
            slots=np.pad(self.slots, (0, more), constant_values=-1),
            tables=self.tables,
            work=self.work.and_padding(counts, rows),
            part=part,
        )


class Inputs:
    """Makes the device's view of batches."""

    def __init__(
        self,
        tables: BlockTables,
        block_size: int,
        planner: Planner | None,
        device: torch.device,
        run: int | None = None,
    ) -> None:
        """`run`: that of `AttentionMeta`."""
        self.tables = tables
        self.run = run
        self.block_size = block_size
        self.planner = planner
        """Divides the work where the device's kernels want that."""
        self.device = device

    def tokens(self, message: StepMessage) -> Tokens:
        """A step of any kind; the part of `needed` tokens is told apart where not all are."""
        return self.sent(self.step(message))

    def sent(self, step: Step) -> Tokens:
        """A step on the device."""
        return self.seen(step, send(self.arrays(step), self.device))

    def step(self, message: StepMessage) -> Step:
        """A step's numbers, laid out for each of its tokens. The tables are brought up to date."""
        counts, starts, ids = np.array(message.counts), np.array(message.starts), np.array(message.ids, dtype=np.int64)
        own = np.arange(len(counts))
        if len(counts) == len(ids):
            positions, owners, first_rows = starts, own, own
        else:
            first_rows = np.cumsum(counts) - counts
            positions = np.arange(len(ids)) - np.repeat(first_rows - starts, counts)
            owners = np.repeat(own, counts)
        kv_lens = starts + counts
        self.tables.apply(message.edits)
        tables = self.tables.array[message.rows, : self._width(kv_lens)]
        slots = tables[owners, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        work = _Work(own, first_rows, counts, kv_lens)
        if message.positions:
            positions = np.array(message.positions, dtype=np.int64)
        return self._needing(np.array(message.needed), ids, positions, slots, tables, work)

    def _needing(
        self, needed: Integers, ids: Integers, positions: Integers, slots: Integers, tables: Integers, work: _Work
    ) -> Step:
        part = work.last(needed) if needed.sum() < len(ids) else None
        return Step(ids, positions, slots, tables, work, part)

    def _width(self, kv_lens: Integers) -> int:
        """Blocks of the longest sequence."""
        return -(-int(kv_lens.max(initial=1)) // self.block_size)

    def empty(self, counts: Integers, needed: Integers) -> Step:
        """Tokens of no sequence, to run the model without effect: nothing is stored, and what is read is any memory."""
        zeros = np.zeros(counts.sum(), dtype=np.int64)
        # The keys of a sequence all lie in the first blocks, however long it is.
        kv_lens = np.minimum(counts, self.tables.array.shape[1] * self.block_size)
        tables = np.zeros((len(counts), self._width(kv_lens)), dtype=np.int32)
        work = _Work(np.arange(len(counts)), np.cumsum(counts) - counts, counts, kv_lens)
        return self._needing(needed, zeros, zeros, zeros - 1, tables, work)

    def warmup_tokens(self, num_tokens: int, num_sequences: int) -> Tokens:
        """An empty step of sequences of about equal length, each of which needs its last token's hidden state."""
        counts = np.full(num_sequences, num_tokens // num_sequences)
        counts[0] += num_tokens - counts.sum()
        return self.sent(self.empty(counts, np.ones_like(counts)))

    def arrays(self, step: Step) -> Arrays:
        """All numbers of a step that the device gets, by name."""
        arrays: Arrays = {"ids": step.ids, "positions": step.positions, "slots": step.slots}
        arrays |= self._plan(step, step.work, "")
        if step.part is not None:
            arrays |= {"output.indices": step.part.rows, **self._plan(step, step.part, "output.")}
        return {**arrays, "tables": step.tables}

    def _plan(self, step: Step, work: _Work, prefix: str) -> Arrays:
        if self.planner is None:
            return {}
        starts = work.sequences * step.tables.shape[1]
        plan = self.planner.plan(starts, work.first_rows, work.counts, work.kv_lens)
        return {prefix + name: array for name, array in plan.items()}

    def sections(self, tokens: int, outputs: int | None, max_sequences: int) -> Sections:
        """Room for the arrays of steps that are padded to so many tokens and outputs; of flat block tables.

        Without `outputs` the steps are of single tokens. Else they have room for tiles of 16 tokens and more on the
        average, and for eight shorter ones.
        """
        assert self.planner is not None, "graphs of steps are a GPU's"
        singles = min(tokens, max_sequences)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("ids", "positions", "slots"), (tokens,))
        shapes["splits"] = (self.planner.max_num_splits(singles), plan.SPLIT_COLUMNS)
        if outputs is not None:
            shapes["tiles"] = (tokens // 16 + 8, plan.TILE_COLUMNS)
            shapes["output.indices"] = (outputs,)
            shapes["output.splits"] = (self.planner.max_num_splits(outputs), plan.SPLIT_COLUMNS)
        return Sections({**shapes, "tables": (singles * self.tables.array.shape[1],)})

    def seen(self, step: Step, tensors: Mapping[str, Tensor]) -> Tokens:
        """What the model takes: the arrays of a step, as tensors on the device."""
        part = None if step.part is None else self._meta(step.part, tensors, "output.", None)
        meta = self._meta(step.work, tensors, "", part)
        return Tokens(tensors["ids"], tensors["positions"], meta, bool((step.ids < 0).any()))

    def _meta(
        self, work: _Work, tensors: Mapping[str, Tensor], prefix: str, output_part: AttentionMeta | None
    ) -> AttentionMeta:
        divided = None
        if self.planner is not None:
            divided = AttentionPlan(tensors.get(f"{prefix}tiles"), tensors.get(f"{prefix}splits"))
        return AttentionMeta(
            num_tokens=int(work.counts.sum()),
            block_tables=tensors["tables"],
            slot_mapping=tensors["slots"],
            sequences=work.sequences.tolist(),
            query_lens=work.counts.tolist(),
            kv_lens=work.kv_lens.tolist(),
            output_indices=tensors.get(f"{prefix}indices"),
            plan=divided,
            run=self.run,
            output_part=output_part,
        )
