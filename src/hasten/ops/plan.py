"""How the attention of a flat batch is divided for a GPU: numbers, worked out on the host once a step.

Sequences with one query are cut into splits of keys; those with several, into tiles of queries. Where these have much
to do, the keys of their sequences are gathered first, so that a program reads large pieces of neighbouring memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]

TILE = 64
"""Queries in a tile."""
TILE_COLUMNS = 5
"""Of a tile: start of the block table, row of its first query in the queries, in the output, queries, position of the
first; and where attention is not causal, the keys of the sequence."""
GATHERED_KEYS = 128
"""Keys of a sequence are gathered in multiples of this, with zeros behind its last, so that none of another sequence
is among those that a program reads at a time."""
GATHER_COLUMNS = 3
"""Of TILE keys that are gathered: start of the block table, first key, keys of the sequence."""
SPLIT_COLUMNS = 8
"""Of a split: start of the block table, row of the query, of the output, first key, end, keys of the sequence, place,
splits."""
SPLIT_STEP = 32
"""A split begins at a multiple of this number of keys."""
MIN_SPLIT_LEN = 64
"""Keys of one head, or of a few queries of a group of heads, that are worth a program."""
_GROUP_MIN_SPLIT_LEN = 256
"""The same of more queries of a group of heads, whose programs have more keys in flight."""
_FEW_QUERIES = 16
_PROGRAMS = 16
"""Programs for single queries of one head that a multiprocessor can hold, and few tokens should fill."""
_GROUP_PROGRAMS = 4
"""The same for those of a group of heads."""
_MAX_GROUP_ROWS = 64
_LONG_QUERIES = 512
"""Queries of a sequence from which on its keys are read often enough to be gathered first."""
_LONG_PAIRS = 1 << 21
"""Pairs of a query and a key it sees, of a sequence, from which on they are: those of a prompt of 2,048 tokens."""
_SMALL_STEP = 1536
"""Tokens up to which a step may be a graph, which has no room for gathered keys: where they take more pairs."""
_LONG_PAIRS_OF_SMALL_STEPS = 1 << 24
_MANY_KEYS = 1024
"""Keys from which on those of few queries are gathered along with a long sequence's."""
_MAX_GATHERED = 1 << 18
"""Most gathered keys of a step: 128 MiB of each key/value head of 128 in 16 bits."""


def fixed_run(max_kv_len: int) -> int:
    """Keys of a run, for sequences up to a length: at most 32 runs."""
    return max(MIN_SPLIT_LEN, 1 << max(0, -(-max_kv_len // 32) - 1).bit_length())


def group_rows(group: int) -> int:
    """Rows of the matrix product that a program computes for a group of heads with the same keys, padded."""
    return min(max(16, 1 << (group - 1).bit_length()), _MAX_GROUP_ROWS)


def programs_per_split(heads: int, kv_heads: int) -> int:
    """One for each head, or for each group of heads with the same keys, or several for a large group."""
    group = heads // kv_heads
    return heads if group == 1 else kv_heads * -(-group // group_rows(group))


@dataclass(frozen=True)
class AttentionPlan:
    """The work items of one step, on the device; None where there are none of a kind. Items of zeros are no work."""

    tiles: Tensor | None
    """[tiles, TILE_COLUMNS], int32."""
    splits: Tensor | None
    """[splits, SPLIT_COLUMNS], int32."""
    long_tiles: Tensor | None = None
    """[tiles, TILE_COLUMNS], int32, whose first column is where the sequence begins among the gathered keys."""
    gathers: Tensor | None = None
    """[gathered keys / TILE, GATHER_COLUMNS], int32."""


@dataclass(frozen=True)
class Planner:
    """Divides the steps of one device."""

    heads: int
    """Query heads of one layer of this rank."""
    kv_heads: int
    """Key/value heads of one layer of this rank."""
    multiprocessors: int
    run: int | None = None
    """Keys of a run, where splits are single runs or whole sequences: see `AttentionMeta.run`."""
    max_kv_len: int = 0
    """Keys of the longest sequence, where there are runs."""
    gathers: bool = True
    """Whether keys may be gathered: whether the device copies whole tiles of them by itself."""

    @classmethod
    def of(
        cls, device: torch.device, heads: int, kv_heads: int, *, run: int | None = None, max_kv_len: int = 0
    ) -> "Planner | None":
        """That of a device; None for a CPU, whose attention takes a step as it is."""
        if device.type == "cpu":
            return None
        properties = torch.cuda.get_device_properties(device)
        gathers = properties.major >= 9
        return cls(heads, kv_heads, properties.multi_processor_count, run, max_kv_len, gathers)

    def max_num_splits(self, sequences: int) -> int:
        """How many splits a step of this number of sequences with one query may have.

        Enough to keep every multiprocessor busy with several programs, and a few a sequence, so that a long one does
        not end after all others. Of runs, as many as four of the longest sequences have.
        """
        held = _PROGRAMS if self.heads == self.kv_heads else _GROUP_PROGRAMS
        busy = -(-held * self.multiprocessors // programs_per_split(self.heads, self.kv_heads))
        if self.run is None:
            return max(2 * sequences, busy)
        longest = -(-self.max_kv_len // self.run)
        return min(sequences * longest, max(sequences, busy, 4 * longest))

    def min_split_len(self, queries: int) -> int:
        """Keys up to which a sequence is not cut, in a step of this number of single queries."""
        few = self.heads == self.kv_heads or queries <= _FEW_QUERIES
        return MIN_SPLIT_LEN if few else _GROUP_MIN_SPLIT_LEN

    def is_long(self, query_lens: Integers, kv_lens: Integers) -> NDArray[np.bool_]:
        """Which sequences of a step have so many queries and keys that their keys are gathered first."""
        pairs = query_lens * (kv_lens - query_lens // 2)
        least = _LONG_PAIRS if query_lens.sum() > _SMALL_STEP else _LONG_PAIRS_OF_SMALL_STEPS
        return (query_lens >= _LONG_QUERIES) & (pairs >= least)

    def _gathered(self, query_lens: Integers, kv_lens: Integers) -> NDArray[np.bool_]:
        """Which sequences' keys are gathered: the first for which there is room.

        Those that are long, and where there is one, all with several queries of many keys: a few tiles of these alone
        would leave the device idle, and among those of the long ones they do not show.
        """
        chosen = self.is_long(query_lens, kv_lens) & (query_lens > 1)
        if chosen.any():
            chosen |= (query_lens > 1) & (kv_lens >= _MANY_KEYS)
        chosen &= np.cumsum(np.where(chosen, -(-kv_lens // GATHERED_KEYS) * GATHERED_KEYS, 0)) <= _MAX_GATHERED
        return chosen

    def gathers_any(self, query_lens: Integers, kv_lens: Integers, *, causal: bool) -> bool:
        """Whether keys of a step are gathered, for which whole block tables are needed."""
        return self.gathers and causal and self.run is None and bool(self._gathered(query_lens, kv_lens).any())

    def plan(
        self,
        tables: Integers,
        query_rows: Integers,
        query_lens: Integers,
        kv_lens: Integers,
        *,
        causal: bool = True,
        consecutive: bool = False,
    ) -> dict[str, Integers]:
        """The arrays of an `AttentionPlan` of a step, as far as there are any.

        Of each sequence: where its block table begins among the numbers of all, where its queries begin, how many they
        are, and its keys. `causal`: whether tokens see those before them alone; a single query is a sequence's last
        token, or has no position, and sees all keys either way. `consecutive`: see `AttentionMeta`; tiles are for
        single queries, too, then.
        """
        out_rows = np.cumsum(query_lens) - query_lens
        arrays: dict[str, Integers] = {}
        several = query_lens > (0 if consecutive else 1)
        if self.gathers_any(query_lens, kv_lens, causal=causal):
            long = self._gathered(query_lens, kv_lens)
            several &= ~long
            arrays |= long_tiles(tables[long], query_rows[long], out_rows[long], query_lens[long], kv_lens[long])
        if (which := several.nonzero()[0]).size:
            own = tables[which], query_rows[which], out_rows[which], query_lens[which], kv_lens[which]
            arrays["tiles"] = tiles(*own, causal=causal)
        if not consecutive and (which := (query_lens <= 1).nonzero()[0]).size:
            single = tables[which], query_rows[which], out_rows[which], kv_lens[which]
            most = self.max_num_splits(len(which))
            if self.run is None:
                arrays["splits"] = kv_splits(*single, most, self.min_split_len(len(which)))
            else:
                arrays["splits"] = splits_of(*single, run_lengths(kv_lens[which], self.run, most))
        return arrays


def kv_splits(
    tables: Integers, query_rows: Integers, out_rows: Integers, kv_lens: Integers, most: int, shortest: int
) -> Integers:
    """Cut the keys of sequences with one query each into at most `most` splits of about equal length: [splits, 8].

    A sequence of up to `shortest` keys is not cut; one without keys has one split. Those of long splits come first.
    """
    spare = max(1, most - len(tables))
    length = max(shortest, -(-int(kv_lens.sum()) // spare))
    length = -(-length // SPLIT_STEP) * SPLIT_STEP
    counts = np.maximum(1, -(-kv_lens // length))
    even = -(-kv_lens // (SPLIT_STEP * counts)) * SPLIT_STEP  # equal splits of one sequence, none a short rest
    lengths, order = np.maximum(even, 1), _longest_first(np.minimum(even, kv_lens))
    return splits_of(tables[order], query_rows[order], out_rows[order], kv_lens[order], lengths[order])


def _longest_first(lengths: Integers) -> Integers:
    """An order in which programs that take long do not begin last, when others have ended."""
    return np.argsort(-lengths, kind="stable")


def run_lengths(kv_lens: Integers, run: int, most: int) -> Integers:
    """Keys of each sequence's splits where they are whole runs: one each, or all of a sequence's for more than `most`.

    Nothing between: runs are added to those before one by one, and not to each other first.
    """
    few = np.maximum(1, -(-kv_lens // run)).sum() <= most
    return np.full(len(kv_lens), run) if few else np.maximum(kv_lens, 1)


def splits_of(
    tables: Integers, query_rows: Integers, out_rows: Integers, kv_lens: Integers, lengths: Integers
) -> Integers:
    """Cut the keys of sequences with one query each into splits of the sequence's length: [splits, 8]."""
    counts = np.maximum(1, -(-kv_lens // lengths))
    owner = np.repeat(np.arange(len(tables)), counts)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.minimum(index * lengths[owner], kv_lens[owner])
    end = np.minimum(begin + lengths[owner], kv_lens[owner])
    columns = (tables[owner], query_rows[owner], out_rows[owner], begin, end, kv_lens[owner], index, counts[owner])
    return np.stack(columns, axis=1).astype(np.int32)


def tiles(
    tables: Integers,
    query_rows: Integers,
    out_rows: Integers,
    query_lens: Integers,
    kv_lens: Integers,
    *,
    causal: bool = True,
) -> Integers:
    """Cut the queries of sequences into tiles, those with the most keys first: [tiles, 5], or 6 where not `causal`."""
    counts = -(-query_lens // TILE)
    owner = np.repeat(np.arange(len(tables)), counts)
    first = TILE * (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))
    count = np.minimum(TILE, query_lens[owner] - first)
    position = kv_lens[owner] - query_lens[owner] + first
    keys = position + count if causal else kv_lens[owner]
    columns = (tables[owner], query_rows[owner] + first, out_rows[owner] + first, count, position)
    table = np.stack(columns if causal else (*columns, keys), axis=1).astype(np.int32)
    return table[np.argsort(-keys, kind="stable")]


def long_tiles(
    tables: Integers, query_rows: Integers, out_rows: Integers, query_lens: Integers, kv_lens: Integers
) -> dict[str, Integers]:
    """`gathers` [gathered keys / TILE, 3] of sequences, end to end, and their `long_tiles` [tiles, 5] over them."""
    counts = -(-kv_lens // GATHERED_KEYS) * (GATHERED_KEYS // TILE)
    starts = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(tables)), counts)
    first = TILE * (np.arange(len(owner)) - starts[owner])
    gathers = np.stack((tables[owner], first, kv_lens[owner]), axis=1).astype(np.int32)
    return {"long_tiles": tiles(TILE * starts, query_rows, out_rows, query_lens, kv_lens), "gathers": gathers}
