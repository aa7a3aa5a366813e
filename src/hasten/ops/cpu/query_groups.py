"""How the queries of a batch are divided into padded calls of attention on a CPU."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.ops import reference
from hasten.ops.cpu import fixed
from hasten.ops.meta import AttentionMeta

_QUERY_CHUNK = 256
"""Most queries of one sequence in one attention call: bounds the bias and skips keys that lie ahead."""
_CACHED_ELEMENTS = 1 << 19
"""Elements of keys that one attention call gathers, if more than one run: what is gathered must still be in the
processor's cache when it is read, or decoding waits for memory twice."""
_KEPT_BIAS = 1 << 25
"""Elements of attention bias that a step keeps for all layers; with more, each layer makes its own."""


@dataclass(frozen=True)
class Group:
    """Runs of queries that one padded attention call handles: b runs, q queries, k keys (whole blocks)."""

    rows: Tensor | None
    """[b * q] row of the flat batch for each padded query; None where the runs stand in the batch just so."""
    first: int
    """First row in the batch, where `rows` is None."""
    kept: Tensor | None
    """[real queries] place in the padded output of each real query; None where no query is padding."""
    targets: Tensor | None
    """[real queries] row of the flat batch of each real query."""
    blocks: Tensor
    """[b * k / block size, rounded up] cache blocks."""
    positions: Tensor
    """[b] position of each run's first query, from the first key of its blocks on."""
    ends: Tensor
    """[b] keys of each run: all that any of its queries sees, and those before their window in the same block."""
    blank: Tensor
    """[padding] keys of the b * k that are of no sequence, or not written yet: whatever stands there must not count."""
    size: tuple[int, int, int]
    """b, q, k; of keys in whole blocks only where attention is causal, which makes nothing of those behind the last."""

    def bias(self, scores: "Scores") -> Tensor | None:
        """What is added to the scores, [b, n or 1, q, k], and -inf for unseen keys; None where that is nothing."""
        _, queries, keys = self.size
        if scores.are_plain and bool((self.ends == keys).all()):
            return None
        positions_bq = self.positions.unsqueeze(1) + torch.arange(queries)
        keys_k = torch.arange(keys)
        distance_bqk = keys_k - positions_bq.unsqueeze(2)
        unseen_bqk = reference.unseen(distance_bqk, scores.window, scores.causal)
        if not scores.causal:
            unseen_bqk |= (keys_k >= self.ends.unsqueeze(1)).unsqueeze(1)
        distance = distance_bqk.unsqueeze(1)
        bias = torch.zeros(distance.shape) if scores.slopes_n is None else distance * scores.slopes_n.view(-1, 1, 1)
        if scores.bias_nr is not None:
            bias = bias + reference.relative_bias(scores.bias_nr, distance_bqk).transpose(0, 1)
        return bias.masked_fill_(unseen_bqk.unsqueeze(1), float("-inf"))


@dataclass(frozen=True)
class Scores:
    """What decides which keys queries see, and what is added to their scores."""

    slopes_n: Tensor | None
    window: int | None
    causal: bool
    bias_nr: Tensor | None

    @property
    def are_plain(self) -> bool:
        """Whether every query sees every key of its sequence, and nothing is added."""
        return not self.causal and self.slopes_n is None and self.window is None and self.bias_nr is None

    @property
    def heads(self) -> int:
        """Heads that have biases of their own; 1 where all have the same."""
        own = self.slopes_n if self.bias_nr is None else self.bias_nr
        return 1 if own is None else own.shape[0]


@dataclass(frozen=True)
class _Run:
    """Consecutive queries of one sequence."""

    sequence: int
    first: int
    count: int
    skipped: int
    """Cache blocks that lie before the window of its first query."""
    position: int
    """Of its first query, from the first key that is not skipped on."""
    end: int
    """Keys that its last query sees, and those before its window, as far as their block is not skipped."""


def groups_of(meta: AttentionMeta, key_cache: Tensor, scores: Scores) -> list[tuple[Group, Tensor | None]]:
    """Divide a batch into padded groups, once a step; with each group its bias, if all of them may be kept.

    All layers with the same window and biases use it again: they have as many heads and the same slopes.
    """
    most_keys = _CACHED_ELEMENTS // (key_cache.shape[2] * key_cache.shape[3])
    block_size = key_cache.shape[1]
    cut = _Cut.of(meta.run, block_size, causal=scores.causal)
    runs = _runs(meta, block_size, scores, cut)
    groups = [_group(meta, pack, block_size, cut) for pack in _pack(runs, most_keys)]
    keep = sum(math.prod(group.size) for group in groups) * scores.heads <= _KEPT_BIAS
    return [(group, group.bias(scores) if keep else None) for group in groups]


@dataclass(frozen=True)
class _Cut:
    """How the queries of a sequence, and the keys that they see, are cut."""

    queries: int = _QUERY_CHUNK
    """Most queries of a run."""
    blocks: int = 1
    """Cache blocks of keys come in multiples of this number."""
    padded: bool = False
    """Whether every run has as many queries."""
    whole_blocks: bool = True
    """Whether the keys behind the last ones, in the same block, are computed too: a causal query sees none of them."""

    @classmethod
    def of(cls, run: int | None, block_size: int, *, causal: bool) -> "_Cut":
        """For runs of keys of a fixed length, or of any."""
        if run is None:
            return cls(whole_blocks=causal)
        return cls(fixed.QUERIES, run // math.gcd(run, block_size), padded=True)


def _runs(meta: AttentionMeta, block_size: int, scores: Scores, cut: _Cut) -> list[_Run]:
    window = scores.window
    runs, start = [], 0
    for sequence, queries, keys in zip(meta.sequences, meta.query_lens, meta.kv_lens, strict=True):
        for offset in range(0, queries if keys else 0, cut.queries):
            count = min(cut.queries, queries - offset)
            position = keys - queries + offset
            skipped = 0 if window is None else max(0, position - window + 1) // block_size // cut.blocks * cut.blocks
            end = position + count
            if not scores.causal:
                end = keys if window is None else min(keys, end + window - 1)
            before = skipped * block_size
            runs.append(_Run(sequence, start + offset, count, skipped, position - before, end - before))
        start += queries
    return runs


def _pack(runs: list[_Run], most_keys: int) -> list[list[_Run]]:
    """Runs of like size together, so that padding costs at most half as much again as the work itself."""
    packs: list[list[_Run]] = []
    for single in (True, False):
        chosen = [run for run in runs if (run.count == 1) == single]
        if not _fits(chosen, most_keys):
            chosen.sort(key=lambda run: (run.end, run.count))
        while chosen:
            size = _longest_fit(chosen, most_keys)
            packs.append(chosen[:size])
            chosen = chosen[size:]
    return packs


def _longest_fit(runs: list[_Run], most_keys: int) -> int:
    """How many of the first runs go together."""
    low, high = 1, len(runs)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(runs[:middle], most_keys) else (low, middle - 1)
    return low


def _fits(runs: list[_Run], most_keys: int) -> bool:
    if len(runs) < 2:
        return True
    queries, keys = max(run.count for run in runs), max(run.end for run in runs)
    padded = len(runs) * queries * keys
    return len(runs) * keys <= most_keys and padded <= 1.5 * sum(run.count * run.end for run in runs)


def _group(meta: AttentionMeta, runs: list[_Run], block_size: int, cut: _Cut) -> Group:
    queries, keys = cut.queries if cut.padded else max(run.count for run in runs), max(run.end for run in runs)
    blocks = -(-keys // (block_size * cut.blocks)) * cut.blocks
    even = all(run.count == queries for run in runs)
    rows = [row for run in runs for row in range(run.first, run.first + run.count)]
    in_place = even and rows == list(range(rows[0], rows[0] + len(rows)))
    padded = rows if even else [min(run.first + i, run.first + run.count - 1) for run in runs for i in range(queries)]
    kept = [query * queries + i for query, run in enumerate(runs) for i in range(run.count)]
    ends = torch.tensor([run.end for run in runs])
    return Group(
        rows=None if in_place else torch.tensor(padded),
        first=rows[0],
        kept=None if even else torch.tensor(kept),
        targets=None if even else torch.tensor(rows),
        blocks=_blocks(meta.block_tables, runs, blocks),
        positions=torch.tensor([run.position for run in runs]),
        ends=ends,
        blank=(torch.arange(blocks * block_size) >= ends.unsqueeze(1)).flatten().nonzero().squeeze(1),
        size=(len(runs), queries, blocks * block_size if cut.whole_blocks else keys),
    )


def _blocks(tables: Tensor, runs: list[_Run], count: int) -> Tensor:
    """The next `count` cache blocks of each run, behind those that it skips: [runs * count]."""
    own = tables[[run.sequence for run in runs]]
    if not any(run.skipped for run in runs) and count <= tables.shape[1]:
        return own[:, :count].flatten()
    indices = torch.tensor([run.skipped for run in runs]).unsqueeze(1) + torch.arange(count)
    return own.gather(1, indices.clamp_(max=tables.shape[1] - 1)).flatten()
