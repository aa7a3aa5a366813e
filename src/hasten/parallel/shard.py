"""How a tensor is divided over tensor parallel ranks, and merged again.

All shapes are hasten's own layout: a linear's weight is [out, in]; a fused QKV weight is
[(heads + 2 * kv_heads) * head_size, in], first all query heads, then all key heads, then all value heads; that of a
gated unit is [2 * inner, in], first the gate. Those of experts are stacked along a first axis: [experts, out, in].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from hasten.core.model_config import AttentionConfig


class Split(Enum):
    """The way one weight goes to the ranks."""

    REPLICATE = "replicate"
    """Every rank holds it whole."""
    COLUMN = "column"
    """By output features: axis 0 of a weight and of a bias."""
    ROW = "row"
    """By input features: axis 1 of a weight."""
    VOCAB = "vocab"
    """By vocabulary: axis 0, padded with zero rows to a multiple of the ranks."""
    QKV = "qkv"
    """By heads within each of Q, K and V: axis 0. Where key/value heads are fewer than ranks, consecutive ranks hold
    the same one."""
    KV = "kv"
    """By key/value heads: axis 0, with as many copies as in QKV."""
    GATE_UP = "gate_up"
    """By output features within each half, the gate's and the other: axis 0."""
    EXPERTS_GATE_UP = "experts_gate_up"
    """As GATE_UP within each of stacked experts: axis 1."""
    EXPERTS_ROW = "experts_row"
    """As ROW within each of stacked experts: axis 2."""
    EXPERTS_REPLICATE = "experts_replicate"
    """As REPLICATE of each of stacked experts."""


OF_ONE_EXPERT = {
    Split.EXPERTS_GATE_UP: Split.GATE_UP,
    Split.EXPERTS_ROW: Split.ROW,
    Split.EXPERTS_REPLICATE: Split.REPLICATE,
}
"""Splits of stacked experts, and those of one of them."""
WHOLE = (Split.REPLICATE, Split.EXPERTS_REPLICATE)
"""Splits with which every rank holds the same."""
_AXIS = {Split.ROW: 1, Split.EXPERTS_GATE_UP: 1, Split.EXPERTS_ROW: 2}
"""Axes that are divided, where it is not the first."""


def by_expert(how: Split) -> Split:
    """How the same weight goes to ranks that hold whole experts: stacked experts by the axis of their stack."""
    return Split.COLUMN if how in OF_ONE_EXPERT else how


def padded_vocab(vocab_size: int, size: int) -> int:
    """`vocab_size` rounded up to a multiple of `size` ranks."""
    return -(-vocab_size // size) * size


def shard_config(attention: AttentionConfig, size: int) -> AttentionConfig:
    """The heads of one of `size` ranks: at least one for keys and values."""
    kv_heads = max(1, attention.num_kv_heads // size)
    return replace(attention, num_heads=attention.num_heads // size, num_kv_heads=kv_heads)


def _sections(how: Split, rows: int, attention: AttentionConfig) -> list[int]:
    """Lengths of the sections of a whole weight along the axis that is divided, each section for itself."""
    if how is Split.QKV:
        kv = attention.num_kv_heads * attention.head_size
        return [rows - 2 * kv, kv, kv]
    return [rows // 2, rows // 2] if how in (Split.GATE_UP, Split.EXPERTS_GATE_UP) else [rows]


def _copies(how: Split, section: int, size: int, attention: AttentionConfig) -> int:
    """How many consecutive ranks of `size` hold the same rows of a section."""
    if how in WHOLE:
        return size
    of_kv_heads = how is Split.KV or (how is Split.QKV and section > 0)
    return max(1, size // attention.num_kv_heads) if of_kv_heads else 1


def shard_shape(shape: tuple[int, ...], how: Split, size: int, attention: AttentionConfig) -> tuple[int, ...]:
    """Shape of a rank's shard of a whole tensor of `shape`."""
    if size == 1 or how in WHOLE:
        return shape
    if how is Split.VOCAB:
        return (padded_vocab(shape[0], size) // size, *shape[1:])
    axis = _AXIS.get(how, 0)
    lengths = enumerate(_sections(how, shape[axis], attention))
    length = sum(length * _copies(how, index, size, attention) // size for index, length in lengths)
    return (*shape[:axis], length, *shape[axis + 1 :])


def split_sections(sections: Sequence[Tensor], how: Split, rank: int, size: int, attention: AttentionConfig) -> Tensor:
    """Rank `rank`'s shard of a tensor that is given as its whole sections: a copy where there are several."""
    shards, axis = [], _AXIS.get(how, 0)
    for index, section in enumerate(sections):
        copies = _copies(how, index, size, attention)
        shards.append(section.chunk(size // copies, dim=axis)[rank // copies])
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=axis)


def split(tensor: Tensor, how: Split, rank: int, size: int, attention: AttentionConfig) -> Tensor:
    """Rank `rank`'s shard of a whole tensor; a view where the shard is contiguous in it.

    The sizes must divide (`ParallelConfig.validate`), except for VOCAB, which is padded.
    """
    if size == 1 or how in WHOLE:
        return tensor
    if how is not Split.VOCAB:
        axis = _AXIS.get(how, 0)
        lengths = _sections(how, tensor.shape[axis], attention)
        return split_sections(tensor.split(lengths, dim=axis), how, rank, size, attention)
    rows = padded_vocab(tensor.shape[0], size) // size
    shard = tensor[rank * rows : (rank + 1) * rows]
    missing = rows - shard.shape[0]
    return torch.cat([shard, shard.new_zeros(missing, *shard.shape[1:])]) if missing else shard


def merge(shards: Sequence[Tensor], how: Split, attention: AttentionConfig, vocab_size: int) -> Tensor:
    """The whole tensor from all ranks' shards, in rank order: the inverse of `split`."""
    size = len(shards)
    if size == 1 or how in WHOLE:
        return shards[0]
    if how is Split.VOCAB:
        return torch.cat(list(shards), dim=0)[:vocab_size]
    of_rank, axis = shard_config(attention, size), _AXIS.get(how, 0)
    lengths = _sections(how, shards[0].shape[axis], of_rank)
    sections = zip(*(shard.split(lengths, dim=axis) for shard in shards), strict=True)
    return torch.cat(
        [part for index, parts in enumerate(sections) for part in parts[:: _copies(how, index, size, attention)]], axis
    )


def overlap(how: Split, rank: int, size: int, parts: int, vocab_size: int) -> range:
    """Which of `parts` shards hold what rank `rank` of `size` needs."""
    if how in WHOLE:
        return range(rank * parts // size, rank * parts // size + 1)
    if how is Split.VOCAB:
        wanted, held = padded_vocab(vocab_size, size) // size, padded_vocab(vocab_size, parts) // parts
        first = min(rank * wanted, vocab_size - 1)
        last = min((rank + 1) * wanted, vocab_size) - 1
        return range(first // held, max(first, last) // held + 1)
    return range(rank * parts // size, -(-(rank + 1) * parts // size))


def resplit(
    part: Callable[[int], Tensor],
    parts: int,
    how: Split,
    rank: int,
    size: int,
    attention: AttentionConfig,
    vocab_size: int,
) -> Tensor:
    """Rank `rank`'s shard of `size`, from a tensor that is stored as `parts` shards; asks only for those it needs."""
    needed = overlap(how, rank, size, parts, vocab_size)
    if parts == size or how in WHOLE:
        return part(rank if parts == size else needed[0])
    if how is Split.VOCAB:
        return _resplit_vocab([part(index) for index in needed], needed[0], parts, rank, size, vocab_size)
    unit = math.lcm(parts, size)
    in_part, in_rank = unit // parts, unit // size
    pieces = [
        split(part(index // in_part), how, index % in_part, in_part, shard_config(attention, parts))
        for index in range(rank * in_rank, (rank + 1) * in_rank)
    ]
    return merge(pieces, how, shard_config(attention, size), vocab_size)


def _resplit_vocab(
    held: Sequence[Tensor], first_part: int, parts: int, rank: int, size: int, vocab_size: int
) -> Tensor:
    wanted = padded_vocab(vocab_size, size) // size
    offset = first_part * (padded_vocab(vocab_size, parts) // parts)
    start, stop = rank * wanted, min((rank + 1) * wanted, vocab_size)
    rows = held[0] if len(held) == 1 else torch.cat(list(held))
    shard = rows[start - offset : max(start, stop) - offset]
    missing = (wanted if size > 1 else vocab_size) - shard.shape[0]
    return torch.cat([shard, shard.new_zeros(missing, *shard.shape[1:])]) if missing else shard
