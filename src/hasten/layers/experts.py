"""A mixture of experts: each expert divided over the ranks, or whole experts dealt to them.

Shapes: t tokens, h hidden, k experts a token.
"""

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.core.model_config import ExpertsConfig
from hasten.layers.linear import GatedColumnLinear, PackedModule, RowLinear
from hasten.layers.norm import RMSNorm
from hasten.parallel.groups import ALL_ALONE, ALONE, ParallelGroups, TensorGroup


class SharedExpert(nn.Module):
    """An expert that computes every token, scaled by a gate of its own; its inner size is divided over the ranks."""

    def __init__(self, hidden_size: int, inner_size: int, *, gate: ops.Activation, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.gate_up = GatedColumnLinear(hidden_size, inner_size, bias=False, gate=gate, group=group)
        self.down = RowLinear(inner_size, hidden_size, bias=False, group=group)
        self.scale = nn.Parameter(torch.empty(1, hidden_size), requires_grad=False)

    def forward(self, x_th: Tensor) -> Tensor:
        """This rank's part of `sigmoid(x @ scale.T)` times the expert: [t, h], or [parts, t, h] in fp32."""
        return ops.linear_parts(self.gate_up(x_th, self.scale), self.down.packed, whole=True)


class Experts(PackedModule):
    """A router and its experts, gated units, of which each token sees a few, and one sees every token.

    Every rank routes all tokens alike, from the same values. Where each rank has a part of every expert, the first one
    adds the biases of their outputs.
    """

    packed: ops.PackedExperts

    def __init__(
        self, hidden_size: int, config: ExpertsConfig, *, gate: ops.Activation, groups: ParallelGroups = ALL_ALONE
    ) -> None:
        super().__init__()
        self.group = groups.tensor
        self.config = config
        self.unit = ops.GatedUnit(gate, config.limit, config.offset)
        count = config.num_experts // groups.expert.size
        inner = config.inner_size * groups.expert.size // groups.tensor.size
        self.first = groups.expert.rank * count
        self.adds_bias = groups.expert.size > 1 or groups.tensor.rank == 0
        self.router = nn.Parameter(torch.empty(config.num_experts, hidden_size), requires_grad=False)
        self.gate_up = nn.Parameter(torch.empty(count, 2 * inner, hidden_size), requires_grad=False)
        self.down = nn.Parameter(torch.empty(count, hidden_size, inner), requires_grad=False)
        self.router_bias, self.gate_up_bias, self.down_bias = (
            nn.Parameter(torch.empty(shape), requires_grad=False) if config.bias else None
            for shape in ((config.num_experts,), (count, 2 * inner), (count, hidden_size))
        )
        shared = config.shared_size
        self.shared = None if shared is None else SharedExpert(hidden_size, shared, gate=gate, group=groups.tensor)

    def pack(self) -> None:
        """Lay the experts out and let the loaded copies go."""
        self.packed = ops.pack_experts(
            self.gate_up.data,
            self.down.data,
            self.first,
            gate_up_bias_ei=self.gate_up_bias,
            down_bias_eh=self.down_bias if self.adds_bias else None,
        )
        del self.gate_up, self.down, self.gate_up_bias, self.down_bias

    def forward(self, x_th: Tensor | ops.PartialSum, norm: RMSNorm, slots_t: Tensor) -> ops.PartialSum:
        """`x_th` + what the experts make of its norm for each token, as a sum for the next norm to add up.

        `slots_t`: the tokens' cache slots, -1 for padding.
        """
        config, fixed = self.config, self.packed.fixed_order
        normed_th, residual_th, routing = ops.norm_route(
            norm.group.reduced(x_th),
            norm.weight,
            norm.eps,
            self.router,
            config.top_k,
            config.normalized,
            slots_t,
            unit_offset=norm.unit_offset,
            bias_e=self.router_bias,
            fixed_order=fixed,
        )
        parts = ops.experts(normed_th, self.packed, routing, self.unit)
        sum_ = ops.PartialSum(parts, residual=residual_th, over_ranks=self.group.size > 1)
        return sum_ if self.shared is None else sum_.plus(self.shared(normed_th), None)
