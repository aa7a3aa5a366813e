"""What a batch looks like to the device: numbers worked out on the host, sent in one copy a step.

A `StepMessage` becomes a `Step`, its numbers by meaning; `Inputs.arrays` names what of them the device gets. Steps that
are launched kernel by kernel send arrays of just their size, those in graphs are padded and fill sections of a fixed
one.
Shapes: t tokens of the flat batch, s sequences, b blocks of the longest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hasten.engine.step_message import Numbers, StepMessage, TableEdit
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
    encoder: "Tokens | None" = None
    """What the encoder computes first."""


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

    def part(self, needed: Integers, *, first: bool) -> "_Work":
        """The last `needed` tokens of each sequence, or the first."""
        chosen = needed.nonzero()[0]
        counts = needed[chosen]
        first_rows = self.first_rows[chosen]
        if not first:
            first_rows = first_rows + self.counts[chosen] - counts
        return _Work(self.sequences[chosen], first_rows, counts, self.kv_lens[chosen])

    @property
    def rows(self) -> Integers:
        """[t]: the row of each token among the queries of the whole step."""
        starts = np.cumsum(self.counts) - self.counts
        return np.arange(self.counts.sum()) - np.repeat(starts - self.first_rows, self.counts)

    def and_padding(self, counts: Integers, first_rows: Integers) -> "_Work":
        """With this number of padding tokens, which belong to no sequence and see no keys, from these rows on."""
        nothing = np.zeros_like(counts)
        return _Work(*map(np.concatenate, zip(self, _Work(nothing, first_rows, counts, nothing), strict=True)))


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What the tokens of a step attend to."""

    tables: Integers
    """[s, b]"""
    work: _Work
    part: _Work | None
    """The tokens whose hidden states are needed, where not all are."""
    causal: bool
    """Whether tokens see those before them alone."""


@dataclass(frozen=True, kw_only=True)
class Step(_Seen):
    """A batch in numbers, on the host."""

    ids: Integers
    """[t]: as in `Tokens`."""
    positions: Integers
    """[t]"""
    slots: Integers
    """[t]: cache slots; -1 to store nothing."""
    cross: _Seen | None = None
    """What an encoder left for these tokens' sequences."""
    encoder: "Step | None" = None
    """The tokens that it computes first."""

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
        cross = self.cross
        if cross is not None:
            assert outputs is None, "with an encoder, steps of single tokens alone are padded"
            cross = replace(cross, work=cross.work.and_padding(counts, rows))
        return Step(
            ids=np.pad(self.ids, (0, more)),
            positions=np.pad(self.positions, (0, more)),
            slots=np.pad(self.slots, (0, more), constant_values=-1),
            tables=self.tables,
            work=self.work.and_padding(counts, rows),
            part=part,
            causal=self.causal,
            cross=cross,
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
        *,
        causal: bool = True,
        has_encoder: bool = False,
        consecutive: bool = False,
    ) -> None:
        """`run`: that of `AttentionMeta`. `causal`: whether tokens see those before them alone.

        `has_encoder`: whether they see what an encoder left, too. `consecutive`: whether all steps are of texts whose
        blocks follow each other, as `AttentionMeta` says, for kernels of a GPU.
        """
        self.causal, self.has_encoder, self.consecutive = causal, has_encoder, consecutive
        self.tables = tables
        self.run = run
        self.block_size = block_size
        self.planner = planner
        """Divides the work where the device's kernels want that."""
        self.device = device

    def tokens(self, message: StepMessage) -> Tokens:
        """A step of any kind; the `needed` tokens are a part of their own where not all are."""
        return self.sent(self.step(message))

    def sent(self, step: Step) -> Tokens:
        """A step on the device."""
        return self.seen(step, send(self.arrays(step), self.device))

    def step(self, message: StepMessage) -> Step:
        """A step's numbers, laid out for each of its tokens. The tables are brought up to date."""
        self.tables.apply(message.edits)
        if message.rows:
            step = self._laid_out(message.ids, message.rows, message.starts, message.counts)
        else:
            step = self._of_texts(message.ids, message.counts)
        if len(message.positions):
            step = replace(step, positions=np.array(message.positions, dtype=np.int64))
        step = self._needing(step, np.array(message.needed), first=message.needs_first)
        if message.input_rows:
            step = self._crossing(step, np.array(message.input_rows), np.array(message.input_lens))
        if message.encoder_counts:
            counts = message.encoder_counts
            encoder = self._laid_out(message.encoder_ids, message.encoder_rows, [0] * len(counts), counts)
            step = replace(step, encoder=replace(encoder, causal=False))
        return step

    def _of_texts(self, token_ids: list[int] | Numbers, lengths: list[int]) -> Step:
        """Texts computed whole, in the cache's first blocks, one behind another, each from a block's beginning."""
        counts, ids = np.array(lengths), np.asarray(token_ids, dtype=np.int64)
        own, first_rows = np.arange(len(counts)), np.cumsum(counts) - counts
        blocks = -(-counts // self.block_size)
        first_blocks = np.cumsum(blocks) - blocks
        positions = np.arange(len(ids)) - np.repeat(first_rows, counts)
        slots = positions + np.repeat(first_blocks * self.block_size, counts)
        tables = first_blocks[:, None]
        if not self._reads_first_blocks(counts):
            # behind a text's end nothing is read of its row
            tables = np.minimum(tables + np.arange(self._width(counts)), int(blocks.sum()) - 1)
        tables = tables.astype(np.int32)
        work = _Work(own, first_rows, counts, counts)
        return Step(ids=ids, positions=positions, slots=slots, tables=tables, work=work, part=None, causal=self.causal)

    def _reads_first_blocks(self, lengths: Integers) -> bool:
        """Whether of texts of these lengths the first block's number is all that is read."""
        if self.planner is None or not self.consecutive:
            return False
        return not self.planner.gathers_any(lengths, lengths, causal=self.causal)

    def _laid_out(self, token_ids: list[int] | Numbers, rows: list[int], first: list[int], lengths: list[int]) -> Step:
        """Tokens of sequences with these rows of the tables; of each, `first` are computed and `lengths` come."""
        counts, starts, ids = np.array(lengths), np.array(first), np.array(token_ids, dtype=np.int64)
        own = np.arange(len(counts))
        if len(counts) == len(ids):
            positions, owners, first_rows = starts, own, own
        else:
            first_rows = np.cumsum(counts) - counts
            positions = np.arange(len(ids)) - np.repeat(first_rows - starts, counts)
            owners = np.repeat(own, counts)
        kv_lens = starts + counts
        tables = self.tables.array[rows, : self._width(kv_lens)]
        slots = tables[owners, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        work = _Work(own, first_rows, counts, kv_lens)
        return Step(ids=ids, positions=positions, slots=slots, tables=tables, work=work, part=None, causal=self.causal)

    def _needing(self, step: Step, needed: Integers, *, first: bool = False) -> Step:
        return replace(step, part=step.work.part(needed, first=first)) if needed.sum() < len(step.ids) else step

    def _crossing(self, step: Step, rows: Integers, lengths: Integers) -> Step:
        """The step of sequences for which an encoder left these token counts, in blocks of these rows of the tables."""
        tables = self.tables.array[rows, : self._width(lengths)]
        work, part = step.work._replace(kv_lens=lengths), step.part
        if part is not None:
            # the last layer's queries are those of the part alone by then
            starts = np.cumsum(part.counts) - part.counts
            part = part._replace(first_rows=starts, kv_lens=lengths[part.sequences])
        return replace(step, cross=_Seen(tables=tables, work=work, part=part, causal=False))

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
        step = Step(
            ids=zeros, positions=zeros, slots=zeros - 1, tables=tables, work=work, part=None, causal=self.causal
        )
        step = self._needing(step, needed)
        return self._crossing(step, np.zeros_like(counts), kv_lens) if self.has_encoder else step

    def warmup_tokens(self, num_tokens: int, num_sequences: int) -> Tokens:
        """An empty step of sequences of about equal length, each of which needs its last token's hidden state.

        Where there is an encoder, these are the lengths of its inputs, and the decoder computes a token of each.
        """
        counts = np.full(num_sequences, num_tokens // num_sequences)
        counts[0] += num_tokens - counts.sum()
        ones = np.ones_like(counts)
        if not self.has_encoder:
            return self.sent(self.empty(counts, ones))
        encoder = replace(self.empty(counts, counts), causal=False, cross=None)
        return self.sent(replace(self.empty(ones, ones), encoder=encoder))

    def arrays(self, step: Step) -> Arrays:
        """All numbers of a step that the device gets, by name."""
        arrays: Arrays = {"ids": step.ids, "positions": step.positions, "slots": step.slots}
        arrays |= self._plans(step, "")
        if step.part is not None:
            arrays["output.indices"] = step.part.rows
        if step.encoder is not None:
            arrays |= {f"encoder.{name}": array for name, array in self.arrays(step.encoder).items()}
        if step.cross is not None:
            arrays |= {**self._plans(step.cross, "cross."), "cross.tables": step.cross.tables}
        return {**arrays, "tables": step.tables}

    def _plans(self, seen: _Seen, prefix: str) -> Arrays:
        part = {} if seen.part is None else self._plan(seen, seen.part, f"{prefix}output.")
        return self._plan(seen, seen.work, prefix) | part

    def _plan(self, seen: _Seen, work: _Work, prefix: str) -> Arrays:
        if self.planner is None:
            return {}
        starts = work.sequences * seen.tables.shape[1]
        lengths = work.counts, work.kv_lens
        plan = self.planner.plan(starts, work.first_rows, *lengths, causal=seen.causal, consecutive=self.consecutive)
        return {prefix + name: array for name, array in plan.items()}

    def sections(self, tokens: int, outputs: int | None, max_sequences: int) -> Sections:
        """Room for the arrays of steps that are padded to these numbers of tokens and outputs; of flat block tables.

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
        tables = (singles * self.tables.array.shape[1],)
        if self.has_encoder:
            shapes |= {"cross.splits": shapes["splits"], "cross.tables": tables}
        return Sections({**shapes, "tables": tables})

    def seen(self, step: Step, tensors: Mapping[str, Tensor]) -> Tokens:
        """What the model takes: the arrays of a step, as tensors on the device."""
        cross = whole = None
        if step.cross is not None:
            whole = self._meta(step.cross.work, tensors, "cross.", "")
            cross = None if step.cross.part is None else self._meta(step.cross.part, tensors, "cross.", "output.")
        part = None if step.part is None else self._meta(step.part, tensors, "", "output.", cross=cross)
        meta = self._meta(step.work, tensors, "", "", part, whole)
        encoder = None
        if step.encoder is not None:
            start = "encoder."
            own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            encoder = self.seen(step.encoder, own)
        return Tokens(tensors["ids"], tensors["positions"], meta, bool((step.ids < 0).any()), encoder)

    def _meta(
        self,
        work: _Work,
        tensors: Mapping[str, Tensor],
        seen: str,
        part: str,
        output_part: AttentionMeta | None = None,
        cross: AttentionMeta | None = None,
    ) -> AttentionMeta:
        """`seen` and `part`: what names of its arrays begin with."""
        prefix = seen + part
        divided = None
        if self.planner is not None:
            names = (field.name for field in fields(AttentionPlan))
            divided = AttentionPlan(**{name: tensors.get(f"{prefix}{name}") for name in names})
        return AttentionMeta(
            num_tokens=int(work.counts.sum()),
            block_tables=tensors[f"{seen}tables"],
            slot_mapping=tensors["slots"],
            sequences=work.sequences.tolist(),
            query_lens=work.counts.tolist(),
            kv_lens=work.kv_lens.tolist(),
            output_indices=None if seen else tensors.get(f"{part}indices"),
            plan=divided,
            consecutive=self.consecutive,
            run=self.run,
            output_part=output_part,
            cross=cross,
        )
