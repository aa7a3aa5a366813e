"""Mixtures of experts."""

from typing import TYPE_CHECKING

from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops import cpu
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.partial_sum import PartialSum

if TYPE_CHECKING:
    pass
from hasten.ops.dispatch.norms import norm


def route(
    x_th: Tensor,
    router_eh: Tensor,
    top_k: int,
    normalized: bool,
    slots_t: Tensor | None = None,
    *,
    bias_e: Tensor | None = None,
    fixed_order: bool = False,
) -> Routing:
    """The `top_k` most probable experts of each token by `softmax(x @ router.T + bias)` in fp32.

    The first among equals is taken. Their probabilities are the weights of their outputs, or where `normalized` divided
    by their sum. The last tokens may be padding, which has no cache slot in `slots_t` [t] (-1) and may go to any
    experts. With `fixed_order`, other tokens change no bit of a token's weights. Source: Shazeer et al., "Outrageously
    Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import router

        return router.route(x_th, router_eh, top_k, normalized, slots_t, bias_e=bias_e, fixed_order=fixed_order)
    return cpu.experts.route(x_th, router_eh, top_k, normalized, bias_e, fixed_order)


def norm_route(
    x_th: Tensor | PartialSum,
    weight_h: Tensor,
    eps: float,
    router_eh: Tensor,
    top_k: int,
    normalized: bool,
    slots_t: Tensor | None = None,
    *,
    unit_offset: bool = False,
    bias_e: Tensor | None = None,
    fixed_order: bool = False,
) -> tuple[Tensor, Tensor, Routing]:
    """`norm` with `rms`, and `route` of its result: the norm, what was normed, and the experts of each token."""
    alone = weight_h.is_cuda and x_th.shape[0] == 1 and not fixed_order
    if alone and isinstance(x_th, PartialSum) and x_th.peers is None:
        from hasten.ops.gpu import router

        return router.norm_route(
            x_th, weight_h, eps, router_eh, top_k, normalized, unit_offset=unit_offset, bias_e=bias_e
        )
    normed_th, total_th = norm(x_th, weight_h, None, eps, rms=True, unit_offset=unit_offset)
    routing = route(normed_th, router_eh, top_k, normalized, slots_t, bias_e=bias_e, fixed_order=fixed_order)
    return normed_th, total_th, routing


def pack_experts(
    gate_up_eih: Tensor,
    down_ehi: Tensor,
    first: int = 0,
    *,
    gate_up_bias_ei: Tensor | None = None,
    down_bias_eh: Tensor | None = None,
) -> PackedExperts:
    """Lay out experts' weights [e, 2 * i, h] and [e, h, i] once for `experts`, which then has no use for them.

    `first`: the number of the first of them, where other ranks hold others. Biases are [e, 2 * i] and [e, h].
    """
    if gate_up_eih.is_cuda:
        from hasten.ops.gpu import experts as kernels

        return kernels.pack_experts(gate_up_eih, down_ehi, first, gate_up_bias_ei, down_bias_eh)
    return cpu.experts.pack_experts(gate_up_eih, down_ehi, first, gate_up_bias_ei, down_bias_eh)


def experts(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:
    """Sums of the experts that tokens go to, each times its weight: [t, h], or parts to be added up, [k, t, h] in fp32.

    An expert is a gated unit of the halves of `x @ gate_up.T + gate_up_bias`, and the linear layer behind it,
    `inner @ down.T + down_bias`. Experts that other ranks hold count as zero.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import experts as kernels

        return kernels.experts(x_th, weights, routing, unit)
    return cpu.experts.experts(x_th, weights, routing, unit)
