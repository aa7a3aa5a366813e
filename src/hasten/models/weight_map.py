"""One row a weight, read by converter, loader and exporter.

`{}` in a name stands for the layer's number. Templates are exact; nothing is matched by substring.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from hasten.core.config import AttentionConfig, ModelConfig
from hasten.parallel.shard import Split, shard_config, split

Layout = Callable[[Tensor, AttentionConfig], Tensor]
Axis = Literal["vocab", "hidden", "inner", "qkv"]
Init = Literal["normal", "ones", "zeros"]


def axis_size(axis: Axis, config: ModelConfig) -> int:
    """Length of an axis in a model so configured."""
    attention = config.attention
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "qkv": (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_size,
    }[axis]


def same(tensor: Tensor, _: AttentionConfig) -> Tensor:
    """Hugging Face's layout is ours."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Row:
    """One weight under its three names, and how it is divided over ranks."""

    hf: str
    """Name in a Hugging Face checkpoint, without the base model's prefix."""
    ours: str
    """Name of the parameter in hasten's model."""
    ft: str
    """Name in a FasterTransformer folder, without `model.` before and the rank and `.bin` behind."""
    axes: tuple[Axis, ...]
    """What its axes are; a linear's weight is (out, in)."""
    split: Split = Split.REPLICATE
    from_hf: Layout = same
    """Hugging Face's layout to ours."""
    to_hf: Layout = same
    """Our layout to Hugging Face's: the inverse of `from_hf`."""
    hf_by_head: bool = False
    """Hugging Face's axis 0 goes head by head, so that a rank's shard of it is one run."""
    init: Init = "normal"
    """How a random model starts it."""

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the whole tensor, the same in Hugging Face's layout and in ours."""
        return tuple(axis_size(axis, config) for axis in self.axes)

    def shard_from_hf(self, tensor: Tensor, rank: int, size: int, attention: AttentionConfig) -> Tensor:
        """Rank `rank`'s shard, in our layout, of a whole tensor in Hugging Face's; a view where the layouts agree."""
        if self.hf_by_head:
            return self.from_hf(tensor.chunk(size, dim=0)[rank], shard_config(attention, size))
        return split(self.from_hf(tensor, attention), self.split, rank, size, attention)


@dataclass(frozen=True)
class Tie:
    """A weight that the configuration takes from another, and that a checkpoint may hold all the same."""

    row: Row
    to: Row
    """The row that it repeats."""


@dataclass(frozen=True)
class WeightMap:
    """All weights of an architecture."""

    rows: tuple[Row, ...]
    """In the order of the model; those of a layer, with `{}` in their names, stand together."""
    hf_prefix: str
    """What a checkpoint of the full model, but not of the base model, puts before the base model's names."""
    hf_unprefixed: frozenset[str] = frozenset()
    """Names that belong to the full model itself and never carry the prefix."""
    head_tie: Tie | None = None
    """The language model head, where the configuration ties it; a head in the checkpoint that differs wins."""

    def expand(self, num_layers: int) -> Iterator[Row]:
        """The rows of a model with so many layers, every `{}` filled in, in the order in which the model uses them."""
        of_layers = [index for index, row in enumerate(self.rows) if "{}" in row.ours]
        first, last = of_layers[0], of_layers[-1] + 1
        yield from self.rows[:first]
        for layer in range(num_layers):
            for row in self.rows[first:last]:
                names = {name: getattr(row, name).format(layer) for name in ("hf", "ours", "ft")}
                yield replace(row, **names)
        yield from self.rows[last:]
