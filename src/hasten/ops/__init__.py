"""Typed tensor operations: the only room that asks which device a tensor is on.

Each function is defined in `reference.py`, in plain torch; `cpu.py` holds faster paths with the same signatures.
Shapes: t tokens of the flat batch, h hidden, o output features, n heads, m key/value heads, d head size, v vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor

from hasten.core.config import DTypeName
from hasten.ops import cpu, reference
from hasten.ops.meta import AttentionMeta
from hasten.ops.packed import PackedLinear

Activation = Literal["gelu_tanh"]

TORCH_DTYPES: dict[DTypeName, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""torch's types by the names of the configuration."""

__all__ = [
    "TORCH_DTYPES",
    "Activation",
    "AttentionMeta",
    "PackedLinear",
    "copy_blocks",
    "default_device",
    "embedding",
    "layer_norm",
    "linear",
    "pack_linear",
    "paged_attention",
    "write_cache",
]


def embedding(ids_t: Tensor, weight_vh: Tensor, first: int | None = None) -> Tensor:
    """Rows of `weight_vh` for token ids [t].

    With `first`, the weight is a share of the vocabulary that begins there: ids outside it, which other ranks hold,
    give zeros.
    """
    return reference.embedding(ids_t, weight_vh, first)


def layer_norm(x_th: Tensor, weight_h: Tensor, bias_h: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis. Source: Ba, Kiros, Hinton, "Layer Normalization", 2016."""
    return reference.layer_norm(x_th, weight_h, bias_h, eps)


def pack_linear(weight_oh: Tensor, *, shared: bool = False) -> PackedLinear:
    """Lay out a weight [o, h] once for `linear` on the device that it is on; the weight itself may then be dropped.

    A `shared` weight stays in use elsewhere: it is not copied unless the device cannot compute on it as it is.
    """
    backend = cpu if weight_oh.device.type == "cpu" else reference
    return backend.pack_linear(weight_oh, shared)


def linear(
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None = None,
    *,
    activation: Activation | None = None,
    residual_to: Tensor | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias) + residual`, [t, o] in the type of `x_th`, summed in at least fp32."""
    backend = cpu if x_th.device.type == "cpu" else reference
    return backend.linear(x_th, weight, bias_o, activation, residual_to)


def write_cache(key_tmd: Tensor, value_tmd: Tensor, key_cache: Tensor, value_cache: Tensor, slots_t: Tensor) -> None:
    """Store keys and values [t, m, d] in caches [blocks, block size, m, d] at `slots_t`; -1 stores nothing."""
    reference.write_cache(key_tmd, value_tmd, key_cache, value_cache, slots_t)


def paged_attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    alibi_slopes_n: Tensor | None = None,
) -> Tensor:
    """Causal attention of each token over its own sequence in the paged cache: [t, n, d].

    The keys and values of the batch's own tokens must be in the cache already. With slopes, `slope * (key position -
    query position)` is added to each score. Source: Press, Smith, Lewis, "Train Short, Test Long", 2022 (ALiBi);
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
    """
    backend = cpu if query_tnd.device.type == "cpu" else reference
    return backend.paged_attention(query_tnd, key_cache, value_cache, meta, scale, alibi_slopes_n)


def copy_blocks(caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy whole blocks within each cache [blocks, ...]: `targets[i]` becomes `sources[i]`."""
    reference.copy_blocks(caches, sources, targets)


def default_device() -> torch.device:
    """A GPU where there is one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
