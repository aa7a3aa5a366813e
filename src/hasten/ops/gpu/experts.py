"""The experts of a mixture, from the tokens that chose them: two products, and a sum where nothing that follows sums.

A pair is a token and one of its experts. Only the weights of experts in pairs are read.

Shapes: T tokens, K experts a token, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops.gpu.expert_groups import grouped
from hasten.ops.gpu.expert_pairs import each_pair
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.order import order_is_fixed


@triton.jit(do_not_specialize=["first"])
def _add_up(
    outputs,
    experts,
    out,
    first,
    H: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sum of a token's outputs [T, K, H], those of experts that other ranks hold left out."""
    start_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    wait_for_inputs(PDL)
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(experts + token * K + k) - first
        held = (expert >= 0) & (expert < COUNT)
        total += tl.load(outputs + (token * K + k) * H + h, held & (h < H), 0.0).to(tl.float32)
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), h < H)


_ALONE = 8
"""Pairs are computed each for itself where of 2 * `_ALONE` at most one is expected to share its expert with another."""
_PARTS_ROWS = 64
"""Most tokens whose outputs of each choice are parts for the next norm to add up; with more, that would be slow."""


def pack_experts(
    gate_up_eih: Tensor,
    down_ehi: Tensor,
    first: int,
    gate_up_bias_ei: Tensor | None = None,
    down_bias_eh: Tensor | None = None,
) -> PackedExperts:
    """A GPU reads weights as they are."""
    weights = gate_up_eih.contiguous(), down_ehi.contiguous()
    biases = (None if bias is None else bias.contiguous() for bias in (gate_up_bias_ei, down_bias_eh))
    return PackedExperts(len(gate_up_eih), first, *weights, (), *biases, fixed_order=order_is_fixed())


def experts(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:
    """See `hasten.ops.experts`."""
    assert x_th.is_contiguous()
    assert routing.counts_be is not None
    (tokens, top_k), all_experts = routing.experts_tk.shape, routing.counts_be.shape[1]
    if not weights.fixed_order and (tokens - 1) * top_k * _ALONE <= all_experts:
        return each_pair(x_th, weights, routing, unit)
    few = weights.fixed_order or tokens <= _PARTS_ROWS
    as_parts = few and not weights.fixed_order and weights.count == all_experts
    dtype = torch.float32 if few else x_th.dtype
    hidden = x_th.shape[1]
    out = x_th.new_empty((top_k, tokens, hidden) if as_parts else (tokens, top_k, hidden), dtype=dtype)
    grouped(x_th, weights, routing, unit, out, parts=as_parts)
    return out if as_parts else _added_up(out, weights, routing, x_th.dtype)


def _added_up(outputs: Tensor, weights: PackedExperts, routing: Routing, dtype: torch.dtype) -> Tensor:
    tokens, top_k, hidden = outputs.shape
    out = outputs.new_empty(tokens, hidden, dtype=dtype)
    block = min(1024, triton.next_power_of_2(hidden))
    _add_up[(tokens, triton.cdiv(hidden, block))](
        outputs, routing.experts_tk, out, weights.first,
        H=hidden, K=top_k, COUNT=weights.count, BLOCK_H=block, num_warps=4, **overlapped(outputs),
    )  # fmt: skip
    return out
