"""Gated units: the activation of one half of a product times the other half. Shapes: t tokens, o output features."""

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.activations import activated
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.gpu.matmul import linear
from hasten.ops.packed import PackedLinear

_BLOCK = 1024


@triton.jit
def _gate(x, out, INNER: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr):
    """BLOCK features of one row."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < INNER
    wait_for_inputs(PDL)
    gate = tl.load(x + row * 2 * INNER + at, valid, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * INNER + INNER + at, valid, 0.0).to(tl.float32)
    tl.store(out + row * INNER + at, (activated(gate, GATE) * up).to(out.dtype.element_ty), valid)


def gated_linear(x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, gate: str) -> Tensor:
    """See `hasten.ops.gated_linear`."""
    both_to = linear(x_th, weight, bias_o, None)
    rows, inner = both_to.shape[0], weight.out_features // 2
    assert both_to.is_contiguous()
    out = both_to.new_empty(rows, inner)
    block = min(_BLOCK, triton.next_power_of_2(inner))
    _gate[(rows, triton.cdiv(inner, block))](
        both_to, out, INNER=inner, BLOCK=block, GATE=gate, num_warps=4, **overlapped(x_th)
    )
    return out
