"""Mixtures of experts on a CPU."""

import torch
from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops import reference
from hasten.ops.cpu import fixed
from hasten.ops.cpu.products import linear, pack_linear
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.order import order_is_fixed
from hasten.ops.packed import PackedLinear


def route(  # noqa: D103
    x_th: Tensor, router_eh: Tensor, top_k: int, normalized: bool, bias_e: Tensor | None, fixed_order: bool
) -> Routing:
    if not fixed_order:
        return reference.route(x_th, router_eh, top_k, normalized, bias_e=bias_e)
    count, width = router_eh.shape
    weight = PackedLinear(count, width, plain=router_eh.float().contiguous(), fixed_order=True)
    logits_te = fixed.product(x_th.float(), weight)
    return reference.chosen(logits_te if bias_e is None else logits_te.add_(bias_e), top_k, normalized)


def pack_experts(  # noqa: D103
    gate_up_eih: Tensor,
    down_ehi: Tensor,
    first: int,
    gate_up_bias_ei: Tensor | None = None,
    down_bias_eh: Tensor | None = None,
) -> PackedExperts:
    pairs = zip(gate_up_eih, down_ehi, strict=True)
    linears = tuple((pack_linear(gate_up_ih, False), pack_linear(down_hi, False)) for gate_up_ih, down_hi in pairs)
    biases = gate_up_bias_ei, down_bias_eh
    return PackedExperts(len(linears), first, None, None, linears, *biases, fixed_order=order_is_fixed())


def experts(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:
    """Tokens sorted by expert, then one product of each kind for every expert that has any."""
    top_k = routing.experts_tk.shape[1]
    order_p = routing.experts_tk.flatten().sort(stable=True).indices
    counts = torch.bincount(routing.experts_tk.flatten(), minlength=weights.first + weights.count).tolist()
    tokens_p = order_p // top_k
    scales_p1 = routing.weights_tk.flatten()[order_p].unsqueeze(1)
    out_th = torch.zeros(x_th.shape, dtype=torch.float32)
    start = sum(counts[: weights.first])
    for expert, (gate_up, down) in enumerate(weights.linears):
        count = counts[weights.first + expert]
        rows, start = slice(start, start + count), start + count
        if count == 0:
            continue
        gate_up_bias, down_bias = (
            None if bias is None else bias[expert] for bias in (weights.gate_up_bias, weights.down_bias)
        )
        gate_ti, up_ti = linear(x_th[tokens_p[rows]].float(), gate_up, gate_up_bias, None).chunk(2, dim=-1)
        inner_ti = reference.gated(gate_ti, up_ti, unit, fixed.activated if weights.fixed_order else None)
        out_th.index_add_(0, tokens_p[rows], linear(inner_ti, down, down_bias, None).mul_(scales_p1[rows]))
    return out_th.to(x_th.dtype)
