"""Mixtures of experts."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from hasten import ops
from hasten.bench.kernel_cases.case import (
    EPS,
    TOLERANCE,
    Call,
    Case,
    Outputs,
    call,
    rows_text,
)
from hasten.bench.kernel_cases.norms import gain, norm_of_sum, sum_of
from hasten.bench.kernel_cases.setting import Setting
from hasten.core.model_config import ExpertsConfig, GatedUnit
from hasten.ops import (
    PackedExperts,
    PartialSum,
    Routing,
    reference,
)


def _mixture(setting: Setting) -> ExpertsConfig:
    """The model's experts, or some of about its MLP's size."""
    inner = max(1, setting.model.intermediate_size // 4)
    return setting.model.experts or ExpertsConfig(num_experts=8, top_k=2, inner_size=inner, normalized=True)


def route(setting: Setting, rows: int) -> Case:
    """The choice of experts."""
    mixture, hidden = _mixture(setting), setting.model.hidden_size

    def weights(route: Callable[..., Routing], *inputs: Tensor) -> Outputs:
        return route(*inputs, mixture.top_k, mixture.normalized).weights_tk  # of almost equal experts either is right

    def make() -> Call:
        inputs = (setting.draw(rows, hidden), setting.draw(mixture.num_experts, hidden, scale=hidden**-0.5))
        return call(partial(weights, ops.route), partial(weights, reference.route), *inputs)

    size = mixture.num_experts
    return Case(
        op="route",
        shape=f"{rows_text(rows)} to {mixture.top_k} of {size}",
        make=make,
        nbytes=(rows + size) * hidden * setting.itemsize + 8 * rows * mixture.top_k,
        flops=2 * rows * hidden * size,
    )


def norm_route(setting: Setting) -> Case:
    """The norm of a single token and the choice of its experts."""
    mixture, hidden = _mixture(setting), setting.model.hidden_size

    def kernel(sum_: PartialSum, weight_h: Tensor, router_eh: Tensor) -> Outputs:
        *normed, routing = ops.norm_route(sum_, weight_h, EPS, router_eh, mixture.top_k, mixture.normalized)
        return *normed, routing.weights_tk  # of almost equal experts either is right

    def definition(sum_: PartialSum, weight_h: Tensor, router_eh: Tensor) -> Outputs:
        normed_th, total_th = reference.norm(sum_, weight_h, None, EPS, rms=True)
        return normed_th, total_th, reference.route(normed_th, router_eh, mixture.top_k, mixture.normalized).weights_tk

    def make() -> Call:
        router_eh = setting.draw(mixture.num_experts, hidden, scale=hidden**-0.5)
        return call(kernel, definition, sum_of(setting, 1, 1), gain(setting)[0], router_eh)

    return Case(
        op="norm_route",
        shape=f"1 row to {mixture.top_k} of {mixture.num_experts}",
        make=make,
        nbytes=(4 + mixture.num_experts) * hidden * setting.itemsize,
        tolerance=norm_of_sum(setting),
    )


def experts(setting: Setting, rows: int, *, ranks: int = 1, biases: bool = False) -> Case:
    """What the experts of the first of `ranks` ranks make of tokens that choose among all at random.

    With `biases`, the linear layers have some, and the gated unit is clamped.
    """
    mixture, hidden = _mixture(setting), setting.model.hidden_size
    size, top_k, inner = mixture.num_experts, mixture.top_k, mixture.inner_size

    def make() -> Call:
        x_th, router_eh = setting.draw(rows, hidden), setting.draw(size, hidden, scale=hidden**-0.5)
        gate_up = setting.draw(size // ranks, 2 * inner, hidden, scale=hidden**-0.5)
        down = setting.draw(size // ranks, hidden, inner, scale=inner**-0.5)
        widths = (2 * inner, hidden) if biases else ()
        drawn = (setting.draw(size // ranks, width) for width in widths)
        weights = PackedExperts(size // ranks, 0, gate_up, down, (), *drawn)
        bias_e = setting.draw(size) if biases else None
        routing = ops.route(x_th, router_eh, top_k, mixture.normalized, bias_e=bias_e)
        unit = GatedUnit("quick_gelu", 7.0, 1.0) if biases else GatedUnit("silu")
        return call(ops.experts, reference.experts, x_th, weights, routing, unit)

    chosen = size / ranks * (1 - (1 - top_k / size) ** rows)
    pairs = rows * top_k / ranks
    return Case(
        op="experts" if ranks > 1 else "each_pair" if rows == 1 else "grouped",
        shape=f"{rows_text(rows)}, {top_k} of {size} experts"
        + (f", {ranks} ranks" if ranks > 1 else "")
        + (", biases" if biases else ""),
        make=make,
        nbytes=(3 * chosen * inner + pairs + rows) * hidden * setting.itemsize,
        flops=6 * pairs * hidden * inner,
        # what lies between the products is rounded
        tolerance=4 * TOLERANCE[setting.dtype],
        waits=True,
    )
