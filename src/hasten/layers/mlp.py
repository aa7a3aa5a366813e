"""The MLP of a layer, plain or gated, its inner features divided over the ranks. Shapes: t tokens, h hidden."""

import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.layers.linear import ColumnLinear, GatedColumnLinear, RowLinear
from hasten.parallel.groups import ALONE, TensorGroup


class MLP(nn.Module):
    """`down(activation(up(x)))`."""

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        *,
        activation: ops.Activation,
        bias: bool = True,
        group: TensorGroup = ALONE,
    ) -> None:
        super().__init__()
        self.up = ColumnLinear(hidden_size, inner_size, bias=bias, activation=activation, group=group)
        self.down = RowLinear(inner_size, hidden_size, bias=bias, group=group)

    def forward(self, x_th: ops.Inputs, residual_th: Tensor | ops.PartialSum | None) -> Tensor | ops.PartialSum:
        """`residual_th` + MLP(`x_th`): [t, h], or a sum for the next norm to add up."""
        return self.down(self.up(x_th, self.down.packed), residual_th)


class GatedMLP(nn.Module):
    """`down(gate(x @ G) * (x @ U))`: a gated unit and what follows it."""

    def __init__(
        self, hidden_size: int, inner_size: int, *, activation: ops.Activation, bias: bool, group: TensorGroup = ALONE
    ) -> None:
        super().__init__()
        self.gate_up = GatedColumnLinear(hidden_size, inner_size, bias=bias, gate=activation, group=group)
        self.down = RowLinear(inner_size, hidden_size, bias=bias, group=group)

    def forward(self, x_th: ops.Inputs, residual_th: Tensor | ops.PartialSum | None) -> Tensor | ops.PartialSum:
        """`residual_th` + MLP(`x_th`): [t, h], or a sum for the next norm to add up."""
        return self.down(self.gate_up(x_th, reader=self.down.packed), residual_th)
