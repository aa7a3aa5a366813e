"""Attention over the paged cache on a CPU by compiled kernels: of single queries by one, of prompts by another."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hasten.ops import native
from hasten.ops.cpu.heads import has_kernel
from hasten.ops.cpu.query_groups import Scores
from hasten.ops.meta import AttentionMeta


@dataclass(frozen=True)
class _Sequences:
    """Those of a batch that one kernel attends to; tensors are of int64."""

    rows_s: Tensor
    """[s] of the block tables."""
    lengths_s: Tensor
    """[s] keys."""
    firsts_s: Tensor | None
    """[s] of their first queries in the batch; None where each sequence has one, in order."""
    counts_s: Tensor
    """[s] queries; where each has one, this is not used."""
    scores: int
    """Products of a query with a key, about, of each head."""


@dataclass(frozen=True)
class _Sorted:
    """The sequences of a batch by the number of their queries."""

    single: _Sequences | None
    several: _Sequences | None


def attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    scores: Scores,
    softcap: float | None,
    sinks_n: Tensor | None,
) -> Tensor | None:
    """As `paged_attention`, of queries of this meta alone; None where the kernels cannot compute it."""
    kernels = native.kernels()
    if (
        kernels is None
        or meta.run is not None
        or query_tnd.dtype != torch.float32
        or not has_kernel(kernels, query_tnd.shape[1], key_cache, None)
    ):
        return None
    found = _sorted(meta, single_too=scores.causal or scores.window is None)
    if found.several is not None and not kernels.prompts.fits(query_tnd.shape[2]):
        return None
    operands = (query_tnd, key_cache, value_cache, meta.block_tables)
    out_tnd = None
    if found.several is not None and found.single is not None:
        out_tnd = torch.empty(query_tnd.shape)
    if found.several is not None:
        several = found.several
        assert several.firsts_s is not None
        out_tnd = kernels.prompts.attention(
            *operands,
            several.rows_s,
            several.lengths_s,
            several.firsts_s,
            several.counts_s,
            out_tnd,
            scale=scale,
            slopes_n=scores.slopes_n,
            sinks_n=sinks_n,
            bias_nr=scores.bias_nr,
            window=scores.window,
            softcap=softcap,
            causal=scores.causal,
            scores=several.scores,
        )
    if found.single is not None:
        single = found.single
        out_tnd = kernels.attention.attention(
            *operands,
            single.rows_s,
            single.lengths_s,
            out_tnd,
            single.firsts_s,
            scale=scale,
            slopes_n=scores.slopes_n,
            sinks_n=sinks_n,
            bias_nr=scores.bias_nr,
            window=scores.window,
            softcap=softcap,
            keys=single.scores,
        )
    return torch.empty_like(query_tnd) if out_tnd is None else out_tnd


def _sorted(meta: AttentionMeta, *, single_too: bool) -> _Sorted:
    """The sequences of a batch, found once a step; unless `single_too`, those of one query count among the others."""
    if meta.numbers is not None and single_too:
        rows_s, lengths_s = meta.numbers
        return _Sorted(_Sequences(rows_s, lengths_s, None, lengths_s, sum(meta.kv_lens)), None)
    key = f"sequences, single {'apart' if single_too else 'too'}"
    found: _Sorted | None = meta.scratch.get(key)
    if found is None:
        lengths = meta.query_lens
        most = 1 if single_too else 0
        single = [number for number, length in enumerate(lengths) if 0 < length <= most]
        several = [number for number, length in enumerate(lengths) if length > most]
        found = meta.scratch[key] = _Sorted(_sequences(meta, single), _sequences(meta, several))
    return found


def _sequences(meta: AttentionMeta, chosen: list[int]) -> _Sequences | None:
    if not chosen:
        return None
    firsts = [0, *accumulate(meta.query_lens)]
    rows, keys, counts = (
        [each[number] for number in chosen] for each in (meta.sequences, meta.kv_lens, meta.query_lens)
    )
    are_all = len(chosen) == len(meta.query_lens) and max(counts) == 1
    return _Sequences(
        torch.tensor(rows),
        torch.tensor(keys),
        None if are_all else torch.tensor([firsts[number] for number in chosen]),
        torch.tensor(counts),
        sum(count * length for count, length in zip(counts, keys, strict=True)),
    )
