"""Weight specs: where each parameter of a model comes from and how it is divided, for converter, loader and exporter.

A map is a plain sequence of specs that a model's file makes of its configuration, so layers may differ. Names are
exact; nothing is matched by substring.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hasten.core.config import AttentionConfig, ModelConfig
from hasten.parallel.shard import Split, shard_config, split, split_sections

Axis = Literal[
    "vocab", "position", "embedding", "hidden", "inner", "gate_up", "query", "kv", "qkv", "heads", "kv_heads", "head"
]
Init = Literal["normal", "ones", "zeros"]


def axis_size(axis: Axis, config: ModelConfig) -> int:
    """Length of an axis in a model so configured."""
    attention = config.attention
    query, kv = attention.num_heads * attention.head_size, attention.num_kv_heads * attention.head_size
    return {
        "vocab": config.vocab_size,
        "position": config.num_positions,
        "embedding": config.embedding_size or config.hidden_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "gate_up": 2 * config.intermediate_size,
        "query": query,
        "kv": kv,
        "qkv": query + 2 * kv,
        "heads": attention.num_heads,
        "kv_heads": attention.num_kv_heads,
        "head": attention.head_size,
    }[axis]


@dataclass(frozen=True)
class Layout:
    """How a stored tensor differs from hasten's layout of the same values."""

    to_hasten: Callable[[Tensor, AttentionConfig], Tensor]
    """A stored tensor with all heads of the configuration given, in hasten's layout."""
    transposed: bool = False
    """Stored as (in, out)."""
    by_head: bool = False
    """Stored head by head along axis 0, so that a rank's shard is one contiguous part."""


SAME = Layout(lambda tensor, _: tensor)
"""Hugging Face's layout of a `nn.Linear`, (out, in), which is hasten's."""


def _group_qkv(tensor: Tensor, attention: AttentionConfig) -> Tensor:
    """Rows of (key/value heads, query heads of each and its key and value, head size), of which queries come first."""
    groups, rest = attention.num_kv_heads, tensor.shape[1:]
    queries = attention.num_heads // groups
    by_group = tensor.reshape(groups, queries + 2, attention.head_size, *rest)
    parts = by_group.split([queries, 1, 1], dim=1)
    return torch.cat([part.reshape(-1, *rest) for part in parts])


HEAD_MAJOR = Layout(_group_qkv, by_head=True)
"""That of a fused QKV in which the rows of each key/value head stand together: its queries, its key, its value."""
TRANSPOSED = Layout(lambda tensor, _: tensor.t(), transposed=True)
"""That of a `Conv1D`, (in, out)."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a Hugging Face checkpoint."""

    name: str
    """Without the base model's prefix."""
    axes: tuple[Axis, ...]
    """Before its layout is changed, but a linear's weight is (out, in) whichever way it is stored."""
    layout: Layout = SAME

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the file."""
        shape = tuple(axis_size(axis, config) for axis in self.axes)
        return shape[::-1] if self.layout.transposed else shape


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One parameter of a model: its name, the stored tensors that it consists of, and how it is divided over ranks."""

    name: str
    """Of the module's parameter."""
    sources: tuple[StoredTensor, ...]
    """Several are concatenated along axis 0; where the `split` has sections, each source is one."""
    axes: tuple[Axis, ...]
    split: Split = Split.REPLICATE
    init: Init = "normal"
    """Values in a model with random weights."""

    @property
    def stored_names(self) -> str:
        """Names of its stored tensors, for messages."""
        return " and ".join(repr(source.name) for source in self.sources)

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the whole parameter, before any split."""
        return tuple(axis_size(axis, config) for axis in self.axes)

    def shard(self, stored: Sequence[Tensor], rank: int, size: int, attention: AttentionConfig) -> Tensor:
        """Rank `rank`'s shard of `size` from the whole stored tensors; a view where layout and split allow one."""
        if len(stored) == 1 and self.sources[0].layout.by_head and attention.num_kv_heads % size == 0:
            part = stored[0].chunk(size, dim=0)[rank]
            return self.sources[0].layout.to_hasten(part, shard_config(attention, size))
        parts = [
            source.layout.to_hasten(tensor, attention) for source, tensor in zip(self.sources, stored, strict=True)
        ]
        if len(parts) > 1 and self.split in (Split.QKV, Split.GATE_UP):
            return split_sections(parts, self.split, rank, size, attention)
        return split(parts[0] if len(parts) == 1 else torch.cat(parts), self.split, rank, size, attention)


@dataclass(frozen=True)
class Tie:
    """A weight that the configuration takes from another, and that a checkpoint may hold all the same."""

    spec: WeightSpec
    to: WeightSpec
    """The weight that it repeats."""


@dataclass(frozen=True)
class WeightMap:
    """All weights of a model."""

    specs: tuple[WeightSpec, ...]
    """In the order in which the model uses them."""
    hf_prefix: str
    """What a checkpoint of the full model, but not of the base model, puts before the base model's names."""
    hf_unprefixed: frozenset[str] = frozenset()
    """Names that belong to the full model itself and never carry the prefix."""
    hf_ignored: tuple[str, ...] = ()
    """Names, without the prefix, of tensors that old checkpoints hold and no model needs; `{layer}` is any number."""
    head_tie: Tie | None = None
    """The language model head, where the configuration ties it; a head in the checkpoint that differs wins."""

    @cached_property
    def _ignored(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(name).replace(r"\{layer\}", r"\d+") for name in self.hf_ignored))

    def ignores(self, name: str) -> bool:
        """Whether a stored tensor, named without the prefix, is a known leftover."""
        return bool(self.hf_ignored) and self._ignored.fullmatch(name) is not None


def norm(
    name: str, hf: str, *, bias: bool, axis: Axis = "hidden", split: Split = Split.REPLICATE
) -> tuple[WeightSpec, ...]:
    """The weight of a norm, and its bias if it has one."""
    inits: dict[str, Init] = {"weight": "ones", "bias": "zeros"} if bias else {"weight": "ones"}
    return tuple(
        WeightSpec(
            name=f"{name}.{kind}",
            sources=(StoredTensor(f"{hf}.{kind}", (axis,)),),
            axes=(axis,),
            split=split,
            init=init,
        )
        for kind, init in inits.items()
    )


def vocabulary(name: str, hf: str) -> WeightSpec:
    """An embedding or a language model head."""
    axes: tuple[Axis, ...] = ("vocab", "embedding")
    return WeightSpec(name=name, sources=(StoredTensor(hf, axes),), axes=axes, split=Split.VOCAB)


def vocabulary_bias(name: str, hf: str) -> WeightSpec:
    """The bias of a language model head."""
    return WeightSpec(name=name, sources=(StoredTensor(hf, ("vocab",)),), axes=("vocab",), split=Split.VOCAB)


def positions(name: str, hf: str) -> WeightSpec:
    """A table of learned positions, whole on every rank."""
    axes: tuple[Axis, ...] = ("position", "hidden")
    return WeightSpec(name=name, sources=(StoredTensor(hf, axes),), axes=axes)


def linear(
    name: str, hf: Mapping[str, Axis], out: Axis, into: Axis, split: Split, *, bias: bool, layout: Layout = SAME
) -> tuple[WeightSpec, ...]:
    """The weight of a linear layer, and its bias if it has one.

    `hf`: the stored layers whose output features follow each other in it, each with the axis of its own. A bias goes
    with the output features, which a ROW split leaves whole.
    """
    of_bias = Split.REPLICATE if split is Split.ROW else split
    plain = SAME if layout.transposed else layout  # a vector is the same either way
    weights = tuple(StoredTensor(f"{each}.weight", (axis, into), layout) for each, axis in hf.items())
    biases = tuple(StoredTensor(f"{each}.bias", (axis,), plain) for each, axis in hf.items())
    weight = WeightSpec(name=f"{name}.weight", sources=weights, axes=(out, into), split=split)
    if not bias:
        return (weight,)
    return weight, WeightSpec(name=f"{name}.bias", sources=biases, axes=(out,), split=of_bias, init="zeros")
