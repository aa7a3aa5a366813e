"""Mixtures of experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.reference.norms import wide
from hasten.ops.reference.products import activated


def gated(gate: Tensor, up: Tensor, unit: GatedUnit, activate: Callable[[Tensor, str], Tensor] | None = None) -> Tensor:
    """A gated unit of two halves, element by element; `activate` computes activations, if that is given.

    Sources: Shazeer, "GLU Variants Improve Transformer", 2020; OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025
    (limits and offset).
    """
    if unit.limit is not None:
        gate, up = gate.clamp(max=unit.limit), up.clamp(-unit.limit, unit.limit)
    return (activate or activated)(gate, unit.gate) * (up + unit.offset if unit.offset else up)


def route(  # noqa: D103
    x_th: Tensor, router_eh: Tensor, top_k: int, normalized: bool, *, bias_e: Tensor | None = None
) -> Routing:
    bias_e = None if bias_e is None else wide(bias_e)
    return chosen(F.linear(wide(x_th), wide(router_eh), bias_e), top_k, normalized)


def chosen(logits_te: Tensor, top_k: int, normalized: bool) -> Routing:
    """The experts of tokens by the router's logits."""
    # a stable sort: the first among equals, which topk does not promise
    experts_tk = logits_te.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if normalized:
        weights_tk = logits_te.gather(1, experts_tk).softmax(-1)
    else:
        weights_tk = logits_te.softmax(-1).gather(1, experts_tk)
    return Routing(experts_tk.int(), weights_tk)


def pack_experts(  # noqa: D103
    gate_up_eih: Tensor,
    down_ehi: Tensor,
    first: int,
    gate_up_bias_ei: Tensor | None = None,
    down_bias_eh: Tensor | None = None,
) -> PackedExperts:
    count = gate_up_eih.shape[0]
    return PackedExperts(count, first, gate_up_eih, down_ehi, gate_up_bias=gate_up_bias_ei, down_bias=down_bias_eh)


def experts(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:  # noqa: D103
    assert weights.gate_up is not None
    assert weights.down is not None
    out_th = wide(torch.zeros_like(x_th))
    for expert in range(weights.count):
        tokens, choices = torch.where(routing.experts_tk == weights.first + expert)
        gate_up_bias, down_bias = (
            None if bias is None else bias[expert] for bias in (weights.gate_up_bias, weights.down_bias)
        )
        gate_ti, up_ti = wide(F.linear(x_th[tokens], weights.gate_up[expert], gate_up_bias)).chunk(2, dim=-1)
        inner_ti = gated(gate_ti, up_ti, unit).to(x_th.dtype)
        scale_t1 = routing.weights_tk[tokens, choices].unsqueeze(1)
        out_th.index_add_(0, tokens, wide(F.linear(inner_ti, weights.down[expert], down_bias)) * scale_t1)
    return out_th.to(x_th.dtype)
