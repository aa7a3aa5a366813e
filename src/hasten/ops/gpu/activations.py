"""Activations and gated units within kernels, by the names of the configuration."""

import triton
import triton.language as tl


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """An activation of fp32 values: see `hasten.ops.reference.activated`."""
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1 + tl.exp(-2 * inner))
    elif ACTIVATION == "quick_gelu":
        y = x / (1 + tl.exp(-1.702 * x))
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        y = tl.where(x < 0, 0.0, x)  # NaN stays NaN
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit
def gated(gate, up, GATE: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """A gated unit of the fp32 values of both halves: see `hasten.ops.reference.gated`."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if OFFSET != 0:
        up += OFFSET
    return activated(gate, GATE) * up
