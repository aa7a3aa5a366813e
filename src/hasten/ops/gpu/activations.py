"""Activations and gated units within kernels, by the names of the configuration."""

import triton
import triton.language as tl


@triton.jit
def gelu_by_odds(x):
    """GELU of fp32 values, within 3.1e-6: `x` times a logistic function.

    Rounding to fp16 loses more of results from 0.0063 on, to bf16 from 0.0016 on.

    Its argument, the logarithm of the odds that a normal number is below `x`, is an odd polynomial: a minimax fit.
    """
    square = x * x
    odds = 2.2381676941317017e-06 * square - 6.1161868840591e-05
    odds = odds * square - 0.00024972299650006613
    odds = odds * square + 0.07293758151511721
    odds = odds * square + 1.5956562720866845
    return x / (1.0 + tl.exp2(x * odds * -1.4426950408889634))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """An activation of fp32 values: see `hasten.ops.reference.activated`."""
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_by_odds":
        y = gelu_by_odds(x)
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
