"""One rank's model and cache: from a batch to hidden states and logits.

Shapes: t tokens of the flat batch, r rows that need logits, v vocabulary, h hidden.
"""

import math
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten import ops
from hasten.core.config import ModelConfig
from hasten.engine.batch import Batch
from hasten.engine.sequence import Sequence
from hasten.layers.attention import Attention
from hasten.models.base import CausalLM

_Integers = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]


class BlockTables:
    """The block tables of running sequences as one array, so that a step copies only what is new."""

    def __init__(self, max_sequences: int, max_blocks: int) -> None:
        self.array = np.zeros((max_sequences, max_blocks), dtype=np.int32)
        self._rows: dict[int, tuple[int, int, int]] = {}
        """Sequence key -> row, version of the table it holds, blocks it holds."""
        self._free = list(range(max_sequences))

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


class Runner:
    """Runs batches through one rank's model."""

    def __init__(
        self, model: CausalLM, config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int
    ) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.device = device
        self.block_size = block_size
        self._attentions = [module for module in model.modules() if isinstance(module, Attention)]
        self._caches: list[Tensor] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of one cache block over all layers of this rank."""
        width = sum(2 * a.num_kv_heads * a.head_size for a in self._attentions)
        return width * self.block_size * self.dtype.itemsize

    def allocate_cache(self, num_blocks: int, max_sequences: int, max_blocks: int) -> None:
        """Allocate the cache once, as zeros, and give every layer its part."""
        self._tables = BlockTables(max_sequences, max_blocks)
        for attention in self._attentions:
            shape = (2, num_blocks, self.block_size, attention.num_kv_heads, attention.head_size)
            key_cache, value_cache = self._zeros(shape)
            attention.bind_cache(key_cache, value_cache)
            self._caches += [key_cache, value_cache]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # numpy asks the system for zero pages, which cost nothing until they are used; torch would write every one.
        return torch.from_numpy(np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)).view(self.dtype).view(shape)

    def forward(self, batch: Batch, needed: list[int]) -> Tensor:
        """Hidden states of each sequence's last `needed` tokens, in order; all tokens leave their keys and values."""
        if batch.copies:
            pairs = torch.tensor(batch.copies, device=self.device)
            ops.copy_blocks(self._caches, pairs[:, 0], pairs[:, 1])
        ids, positions, meta = self._tensors(batch, needed)
        hidden: Tensor = self.model(ids, positions, meta)
        return hidden

    def logits(self, hidden_th: Tensor, rows: list[int]) -> Tensor | None:
        """Logits [r, v] of these rows of the hidden states, on rank 0; None on the others, which must call it too."""
        if len(rows) == hidden_th.shape[0]:
            return self.model.logits(hidden_th)
        return self.model.logits(hidden_th[torch.tensor(rows, device=self.device)])

    def _tensors(self, batch: Batch, needed: list[int]) -> tuple[Tensor, Tensor, ops.AttentionMeta]:
        sequences, counts = batch.sequences, batch.counts
        starts = [sequence.num_computed for sequence in sequences]
        rows = np.array(self._tables.rows(sequences))
        if len(sequences) == batch.num_tokens:
            ids = np.array([s.token_ids[start] for s, start in zip(sequences, starts, strict=True)])
            positions, token_rows = np.array(starts), rows
        else:
            work = list(zip(sequences, starts, counts, strict=True))
            ids = np.fromiter(chain.from_iterable(s.token_ids[a : a + n] for s, a, n in work), dtype=np.int64)
            positions = np.concatenate([np.arange(a, a + n) for _, a, n in work])
            token_rows = np.repeat(rows, counts)
        kv_lens = [start + count for start, count in zip(starts, counts, strict=True)]
        slots = self._tables.array[token_rows, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        last = None if sum(needed) == len(ids) else self._part(counts, needed, kv_lens, rows, slots)
        meta = self._meta(counts, kv_lens, rows, slots, last=last)
        return self._send(ids), self._send(positions), meta

    def _part(
        self, counts: list[int], needed: list[int], kv_lens: list[int], rows: _Integers, slots: _Integers
    ) -> ops.AttentionMeta:
        """The last `needed` tokens of each sequence of a batch."""
        ends = np.cumsum(counts)
        chosen = [place for place, count in enumerate(needed) if count]
        tokens = [np.arange(ends[place] - needed[place], ends[place]) for place in chosen]
        whole = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64)
        return self._meta(
            [needed[place] for place in chosen],
            [kv_lens[place] for place in chosen],
            rows[chosen],
            slots[whole],
            token_rows=self._send(whole),
        )

    def _meta(
        self,
        counts: list[int],
        kv_lens: list[int],
        rows: _Integers,
        slots: _Integers,
        *,
        token_rows: Tensor | None = None,
        last: ops.AttentionMeta | None = None,
    ) -> ops.AttentionMeta:
        return ops.AttentionMeta(
            query_start=self._send(np.cumsum([0, *counts], dtype=np.int32)),
            seq_lens=self._send(np.array(kv_lens, dtype=np.int32)),
            block_tables=self._send(self._tables.array[rows, : -(-max(kv_lens, default=1) // self.block_size)]),
            slot_mapping=self._send(slots),
            query_lens=counts,
            kv_lens=kv_lens,
            rows=token_rows,
            last=last,
        )

    def _send(self, array: _Integers) -> Tensor:
        return torch.from_numpy(array).to(self.device)
