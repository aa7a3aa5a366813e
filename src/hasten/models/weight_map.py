"""Weight specs: where each parameter of a model comes from and how it is divided, for converter, loader and exporter.

A map is a plain sequence of specs that a model's file makes of its configuration, so layers may differ. Names are
exact; nothing is matched by substring.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hasten.core.model_config import AttentionConfig, EncoderConfig, ExpertsConfig, ModelConfig
from hasten.parallel.shard import OF_ONE_EXPERT, Split, shard_config, split, split_sections

Axis = Literal[
    "vocab", "position", "embedding", "hidden", "inner", "gate_up", "query", "kv", "qkv", "heads", "kv_heads", "head",
    "experts", "expert_inner", "expert_gate_up", "shared_inner", "shared_gate_up", "types", "buckets", "labels", "one",
    "both_kv", "encoder_inner", "encoder_gate_up", "encoder_heads",
]  # fmt: skip
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
        "both_kv": 2 * kv,
        "heads": attention.num_heads,
        "kv_heads": attention.num_kv_heads,
        "head": attention.head_size,
        **_expert_sizes(config.experts),
        **_encoder_sizes(config.encoder),
        "types": config.token_types,
        "buckets": attention.relative_buckets,
        "labels": 0 if config.classifier is None else len(config.classifier.labels),
        "one": 1,
    }[axis]


def _encoder_sizes(encoder: EncoderConfig | None) -> dict[str, int]:
    if encoder is None:
        return {}
    inner = encoder.intermediate_size
    return {
        "encoder_inner": inner,
        "encoder_gate_up": 2 * inner,
        "encoder_heads": encoder.attention.num_heads,
    }


def _expert_sizes(experts: ExpertsConfig | None) -> dict[str, int]:
    if experts is None:
        return {}
    shared = experts.shared_size or 0
    return {
        "experts": experts.num_experts,
        "expert_inner": experts.inner_size,
        "expert_gate_up": 2 * experts.inner_size,
        "shared_inner": shared,
        "shared_gate_up": 2 * shared,
    }


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
    stack: int = 0
    """Number of experts whose sources these are, expert by expert; each expert's become a slice of a first axis."""
    other_sources: tuple[StoredTensor, ...] = ()
    """What other checkpoints of the model hold instead of `sources`."""
    init: Init = "normal"
    """Values in a model with random weights."""

    @property
    def stored_names(self) -> str:
        """Names of its stored tensors, for messages."""
        names = [repr(source.name) for source in self.sources]
        return f"{names[0]} to {names[-1]}" if self.stack else " and ".join(names)

    def among(self, names: Container[str]) -> "WeightSpec":
        """The spec for a checkpoint that holds tensors of these names."""
        if not self.other_sources or not all(source.name in names for source in self.other_sources):
            return self
        return replace(self, sources=self.other_sources, stack=0, other_sources=())

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
        if self.stack:
            return self._stacked(parts, rank, size, attention)
        if len(parts) > 1 and self.split in (Split.QKV, Split.GATE_UP):
            return split_sections(parts, self.split, rank, size, attention)
        return split(parts[0] if len(parts) == 1 else torch.cat(parts), self.split, rank, size, attention)

    def _stacked(self, parts: Sequence[Tensor], rank: int, size: int, attention: AttentionConfig) -> Tensor:
        """A shard of experts that are stored each for itself."""
        count = len(parts) // self.stack
        experts = [parts[start : start + count] for start in range(0, len(parts), count)]
        if self.split in OF_ONE_EXPERT:
            how = OF_ONE_EXPERT[self.split]
            return torch.stack([split_sections(each, how, rank, size, attention) for each in experts])
        held = experts[rank * self.stack // size : (rank + 1) * self.stack // size]
        return torch.stack([torch.cat(tuple(each)) for each in held])


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
    hf_aliases: Mapping[str, str] = field(default_factory=dict)
    """Names, without the prefix, under which checkpoints may hold a tensor too, or instead: from these to its own."""
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
    source = StoredTensor(hf, ("vocab",))
    return WeightSpec(name=name, sources=(source,), axes=("vocab",), split=Split.VOCAB, init="zeros")


def table(name: str, hf: str, rows: Axis, width: Axis = "hidden") -> WeightSpec:
    """A table of learned rows, whole on every rank."""
    axes: tuple[Axis, ...] = (rows, width)
    return WeightSpec(name=name, sources=(StoredTensor(hf, axes),), axes=axes)


def positions(name: str, hf: str) -> WeightSpec:
    """A table of learned positions, whole on every rank."""
    return table(name, hf, "position")


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


def experts(
    name: str, hf: str, layers: tuple[str, str, str], count: int, *, stacked: str
) -> tuple[WeightSpec, WeightSpec, WeightSpec]:
    """The router and the weights of a mixture of `count` gated units without biases.

    `hf`: the stored module, in which each expert has its `layers` gate, up and down. `stacked`: the module of
    checkpoints that hold all experts' weights in one tensor, as transformers has them in memory.
    """
    gate, up, down = layers
    router_axes: tuple[Axis, ...] = ("experts", "hidden")
    gate_up_axes: tuple[Axis, ...] = ("experts", "expert_gate_up", "hidden")
    down_axes: tuple[Axis, ...] = ("experts", "hidden", "expert_inner")
    names = [f"{hf}.experts.{expert}" for expert in range(count)]
    gates = [f"{expert}.{each}.weight" for expert in names for each in (gate, up)]
    return (
        WeightSpec(
            name=f"{name}.router",
            sources=(StoredTensor(f"{hf}.gate.weight", router_axes),),
            axes=router_axes,
            other_sources=(StoredTensor(f"{stacked}.gate.weight", router_axes),),
        ),
        WeightSpec(
            name=f"{name}.gate_up",
            sources=tuple(StoredTensor(each, ("expert_inner", "hidden")) for each in gates),
            axes=gate_up_axes,
            split=Split.EXPERTS_GATE_UP,
            stack=count,
            other_sources=(StoredTensor(f"{stacked}.experts.gate_up_proj", gate_up_axes),),
        ),
        WeightSpec(
            name=f"{name}.down",
            sources=tuple(StoredTensor(f"{expert}.{down}.weight", down_axes[1:]) for expert in names),
            axes=down_axes,
            split=Split.EXPERTS_ROW,
            stack=count,
            other_sources=(StoredTensor(f"{stacked}.experts.down_proj", down_axes),),
        ),
    )
