"""How the attention of a flat batch is divided for a GPU: numbers, worked out on the host once a step.

Sequences with one query are cut into splits of keys; those with several, into tiles of queries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Integers = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]

TILE = 64
"""Queries in a tile."""
TILE_COLUMNS = 5
"""Of a tile: start of the block table, row of its first query in the queries, in the output, queries, position of the
first."""
SPLIT_COLUMNS = 8
"""Of a split: start of the block table, row of the query, of the output, first key, end, keys of the sequence, place,
splits."""
_MIN_SPLIT_LEN = 64
_PROGRAMS = 16
"""Programs of the kernel for single queries that one multiprocessor can hold, and few tokens should fill."""


@dataclass(frozen=True)
class AttentionPlan:
    """The work items of one step, on the device; None where there are none of a kind. Items of zeros are no work."""

    tiles: Tensor | None
    """[tiles, TILE_COLUMNS], int32."""
    splits: Tensor | None
    """[splits, SPLIT_COLUMNS], int32."""


@dataclass(frozen=True)
class Planner:
    """Divides the steps of one device."""

    heads: int
    """Query heads of one layer of this rank."""
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device, heads: int) -> "Planner | None":
        """That of a device; None for a CPU, whose attention takes a step as it is."""
        if device.type == "cpu":
            return None
        return cls(heads, torch.cuda.get_device_properties(device).multi_processor_count)

    def max_num_splits(self, sequences: int) -> int:
        """How many splits a step of so many sequences with one query may have.

        Enough to keep every multiprocessor busy with several programs (one per split and head), and a few a sequence,
        so that a long one does not end after all others.
        """
        return max(2 * sequences, -(-_PROGRAMS * self.multiprocessors // self.heads))

    def plan(
        self, tables: Integers, query_rows: Integers, query_lens: Integers, kv_lens: Integers
    ) -> dict[str, Integers]:
        """`tiles` and `splits` of a step, as far as there are any.

        Of each sequence: where its block table begins among the numbers of all, where its queries begin, how many they
        are, and its keys.
        """
        out_rows = np.cumsum(query_lens) - query_lens
        made: dict[str, Integers] = {}
        if (which := (query_lens > 1).nonzero()[0]).size:
            made["tiles"] = tiles(tables[which], query_rows[which], out_rows[which], query_lens[which], kv_lens[which])
        if (which := (query_lens <= 1).nonzero()[0]).size:
            most = self.max_num_splits(len(which))
            made["splits"] = kv_splits(tables[which], query_rows[which], out_rows[which], kv_lens[which], most)
        return made


def kv_splits(tables: Integers, query_rows: Integers, out_rows: Integers, kv_lens: Integers, most: int) -> Integers:
    """Cut the keys of sequences with one query each into at most `most` splits of about equal length: [splits, 8].

    A sequence without keys has one split.
    """
    spare = max(1, most - len(tables))
    length = max(_MIN_SPLIT_LEN, -(-int(kv_lens.sum()) // spare))
    length = -(-length // 32) * 32
    counts = np.maximum(1, -(-kv_lens // length))
    owner = np.repeat(np.arange(len(tables)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    even = (kv_lens + 32 * counts - 1) // (32 * counts) * 32  # equal splits of one sequence, none a short rest
    begin = np.minimum(place * even[owner], kv_lens[owner])
    end = np.minimum(begin + even[owner], kv_lens[owner])
    columns = (tables[owner], query_rows[owner], out_rows[owner], begin, end, kv_lens[owner], place, counts[owner])
    return np.stack(columns, axis=1).astype(np.int32)


def tiles(
    tables: Integers, query_rows: Integers, out_rows: Integers, query_lens: Integers, kv_lens: Integers
) -> Integers:
    """Cut the queries of sequences into tiles, those with the most keys first: [tiles, 5]."""
    counts = -(-query_lens // TILE)
    owner = np.repeat(np.arange(len(tables)), counts)
    first = TILE * (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))
    count = np.minimum(TILE, query_lens[owner] - first)
    position = kv_lens[owner] - query_lens[owner] + first
    columns = (tables[owner], query_rows[owner] + first, out_rows[owner] + first, count, position)
    made = np.stack(columns, axis=1).astype(np.int32)
    return made[np.argsort(-(position + count), kind="stable")]
