"""Linear layers that know their split over ranks. Shapes: t tokens, h in, o out; both are this rank's shard."""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.core.model_config import AttentionConfig
from hasten.parallel.groups import ALONE, TensorGroup
from hasten.parallel.peer_sums import PeerSums


class PackedModule(nn.Module):
    """A layer that lays its weight out for the device once the checkpoint is loaded."""

    def pack(self) -> None:
        """Lay the weight out and let the loaded copy go."""
        raise NotImplementedError

    def matrices(self) -> Iterable[tuple[nn.Module, str]]:
        """The parameters that it multiplies by and that may be quantized, each as a module and its name there."""
        return ()


def set_weight(module: nn.Module, name: str, weight: ops.Table) -> None:
    """Give a module a loaded weight in place of the parameter that it was built with."""
    if isinstance(weight, Tensor):
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    else:
        if hasattr(module, name):
            delattr(module, name)
        setattr(module, name, weight)


class _Linear(PackedModule):
    weight: ops.Weight
    packed: ops.PackedLinear

    def __init__(self, in_features: int, out_features: int, *, bias: bool, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def pack(self) -> None:
        """Lay the weight out and let the loaded copy go."""
        self.packed = ops.pack_linear(self.weight)
        del self.weight

    def matrices(self) -> Iterable[tuple[nn.Module, str]]:
        """The weight."""
        return ((self, "weight"),)


class ReplicatedLinear(_Linear):
    """Every rank holds the weight whole, and computes all output features."""

    def forward(self, x_th: Tensor) -> Tensor:
        """`x @ W.T + b`: [t, o]."""
        return ops.linear(x_th, self.packed, self.bias)


class ColumnLinear(_Linear):
    """Each rank computes a shard of the output features; no communication."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: ops.Activation | None = None,
        group: TensorGroup = ALONE,
    ) -> None:
        super().__init__(in_features, out_features // group.size, bias=bias, group=group)
        self.activation = activation

    def forward(self, x_th: ops.Inputs, reader: ops.PackedLinear | None = None) -> ops.Inputs:
        """`activation(x @ W.T + b)`, this rank's features: [t, o].

        `reader`: the weight that alone multiplies the result, which may be rounded as that needs it.
        """
        return ops.linear(x_th, self.packed, self.bias, activation=self.activation, reader=reader)


class GatedColumnLinear(_Linear):
    """Gate and up projection of a gated unit in one; each rank computes a shard of both."""

    def __init__(
        self, in_features: int, inner_features: int, *, bias: bool, gate: ops.Activation, group: TensorGroup = ALONE
    ) -> None:
        super().__init__(in_features, 2 * inner_features // group.size, bias=bias, group=group)
        self.gate = gate

    def forward(
        self, x_th: ops.Inputs, scale_1h: Tensor | None = None, reader: ops.PackedLinear | None = None
    ) -> ops.Inputs:
        """`gate(x @ G.T) * (x @ U.T)`, this rank's features: [t, o / 2]; with a scale, times `sigmoid(x @ scale.T)`.

        `reader`: as in `ColumnLinear`.
        """
        return ops.gated_linear(x_th, self.packed, self.bias, self.gate, scale_1h, reader=reader)


class QKVLinear(_Linear):
    """Fused projection to queries, keys and values; each rank computes those of its heads."""

    def __init__(
        self,
        in_features: int,
        heads: AttentionConfig,
        *,
        bias: bool,
        clip: float | None = None,
        group: TensorGroup = ALONE,
    ) -> None:
        """`heads`: those of this rank; `clip`: what the absolute values of all three are limited to."""
        out_features = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_size
        super().__init__(in_features, out_features, bias=bias, group=group)
        self.heads = heads
        self.clip = clip

    def forward(
        self,
        x_th: ops.Inputs,
        key_cache: Tensor,
        value_cache: Tensor,
        slots_t: Tensor,
        transform: ops.HeadTransform | None = None,
        *,
        scales: ops.CacheScales | None = None,
        consecutive: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [t, n, d], and the caches that keys and values are in. Queries and keys are changed by `transform`.

        `scales`: those of caches of 8 bits. `consecutive`: as in `AttentionMeta`; keys and values may then be in other
        memory than the given caches.
        """
        heads, caches = self.heads.num_heads, (key_cache, value_cache)
        if transform is None or self.heads.qk_norm != "rms_of_all_heads":
            operands = (x_th, self.packed, self.bias, *caches, slots_t, heads, transform)
            if consecutive:
                return ops.project_consecutive(*operands, clip=self.clip)
            return ops.project(*operands, clip=self.clip, scales=scales), *caches
        qkv_to = ops.clipped(ops.linear(x_th, self.packed, self.bias), self.clip)
        sizes = heads, self.heads.num_kv_heads, self.heads.head_size
        # key heads that several ranks hold count as often on each, so the mean stays what it is
        squares_t2 = self.group.all_reduce(ops.mean_squares(qkv_to, *sizes, self.group.size))
        transform = replace(transform, mean_squares_t2=squares_t2)
        return ops.store_heads(qkv_to, *caches, slots_t, heads, transform, scales=scales), *caches


class RowLinear(_Linear):
    """Each rank takes a shard of the input features; the outputs are summed over the ranks."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, group: TensorGroup = ALONE) -> None:
        super().__init__(in_features // group.size, out_features, bias=bias, group=group)

    def forward(
        self, x_th: ops.Inputs, residual_to: Tensor | ops.PartialSum | None, rows_t: Tensor | None = None
    ) -> Tensor | ops.PartialSum:
        """`residual[rows] + x @ W.T + b` over all ranks' features: [t, o], or a sum for the next norm to add up.

        A residual may be the sum that another row layer left: both are then summed over the ranks at once.
        """
        if self.group.size == 1:
            return ops.add_linear(x_th, self.packed, self.bias, residual_to, rows_t)
        if self.group.sums is not None and isinstance(x_th, Tensor) and not self.packed.is_quantized:
            row_bytes = self.packed.out_features * x_th.dtype.itemsize
            if self.group.sums.takes(len(x_th), row_bytes):
                assert not isinstance(residual_to, ops.PartialSum)
                return self._exchanged(self.group.sums, x_th, residual_to, rows_t)
        parts = ops.linear_parts(x_th, self.packed, whole=isinstance(residual_to, ops.PartialSum))
        if isinstance(residual_to, ops.PartialSum):
            assert residual_to.over_ranks
            return residual_to.plus(parts, self.bias)
        return ops.PartialSum(parts, self.bias, residual_to, rows_t, over_ranks=True)

    def _exchanged(
        self, sums: PeerSums, x_th: Tensor, residual_to: Tensor | None, rows_t: Tensor | None
    ) -> ops.PartialSum:
        size = len(x_th), self.packed.out_features
        own_to, other_to = sums.exchanged(*size, x_th.dtype, lambda out_to: ops.linear_into(x_th, self.packed, out_to))
        return ops.PartialSum(own_to, self.bias, residual_to, rows_t, added=other_to)
