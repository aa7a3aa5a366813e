"""Scales of the key/value cache in quantized checkpoints, as the ranges of each head. Shapes: m key/value heads."""

from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import Tensor

from hasten.core.errors import CheckpointError
from hasten.core.model_config import AttentionConfig
from hasten.models.weight_map import WeightSpec
from hasten.ops.rounding import LARGEST

_QKV = ".qkv.weight"
_SEPARATE = 3
"""Stored projections of a layer whose queries, keys and values are not fused."""


def read_ranges(
    specs: Iterable[WeightSpec],
    names: Container[str],
    read: Callable[[str], Tensor],
    attention: AttentionConfig,
    dtype: torch.dtype,
) -> Mapping[str, Tensor] | None:
    """Greatest keys and values that the scales let caches of `dtype` hold: [2, m] for each attention module.

    `names` are those of stored tensors that belong to no weight, and `read` reads one. None where no layer has scales;
    CheckpointError where one lacks them, or where they are not positive numbers, one of a layer or of each head.
    """
    wanted = {spec.name.removesuffix(_QKV): _scales_of(spec, names) for spec in specs if spec.name.endswith(_QKV)}
    if not any(name for pair in wanted.values() for name in pair):
        return None
    for module, pair in wanted.items():
        if None in pair:
            raise CheckpointError(f"lacks scales of the keys or values of {module}, which other layers have")
    heads = attention.num_kv_heads
    return {
        module: torch.stack([_of_heads(name, read(name), heads) for name in pair if name is not None]) * LARGEST[dtype]
        for module, pair in wanted.items()
    }


def _scales_of(spec: WeightSpec, names: Container[str]) -> tuple[str | None, str | None]:
    """Stored names of the scales of one layer's keys and values."""
    projections = [source.name.removesuffix(".weight") for source in spec.sources]
    module = projections[0].rpartition(".")[0]
    outputs = projections[1:] if len(projections) == _SEPARATE else ["", ""]
    pairs = ((f"{module}.{kind}_scale", f"{output}.output_scale") for kind, output in zip("kv", outputs, strict=True))
    keys, values = (next((name for name in pair if name in names), None) for pair in pairs)
    return keys, values


def _of_heads(name: str, scale: Tensor, heads: int) -> Tensor:
    """The scale of each head: [m]."""
    if scale.numel() not in (1, heads) or not scale.is_floating_point():
        raise CheckpointError(
            f"tensor '{name}' has shape {tuple(scale.shape)} and type {scale.dtype}, but must be one number or one for "
            f"each of {heads} heads"
        )
    scale = scale.flatten().float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"tensor '{name}' is no positive number: the checkpoint is damaged; copy it again")
    return scale.expand(heads)
