"""Gated units: the activation of one half of a product times the other half.

Shapes: t tokens, h hidden (H in kernels), o output features.
"""

from typing import overload

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.activations import activated
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.gpu.library import with_room
from hasten.ops.gpu.matmul import gated_pairs, linear, takes_pairs
from hasten.ops.gpu.row_rounding import activated_rows, rounds
from hasten.ops.packed import PackedLinear
from hasten.ops.rounding import Inputs

_BLOCK = 1024


@triton.jit
def _gate(
    x,
    hidden,
    scale,
    out,
    H: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK features of one row; each program computes the row's scale, where there is one."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < INNER
    wait_for_inputs(PDL)
    gate = tl.load(x + row * 2 * INNER + at, valid, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * INNER + INNER + at, valid, 0.0).to(tl.float32)
    value = activated(gate, GATE) * up
    if SCALED:
        h = tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], tl.float32)
        for offset in tl.static_range(0, H, BLOCK_H):
            inside = h + offset < H
            hidden_h = tl.load(hidden + row * H + offset + h, inside, 0.0).to(tl.float32)
            total += hidden_h * tl.load(scale + offset + h, inside, 0.0).to(tl.float32)
        value *= tl.sigmoid(tl.sum(total, 0))
    tl.store(out + row * INNER + at, value.to(out.dtype.element_ty), valid)


@overload
def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: str,
    scale_1h: Tensor | None = None,
    reader: None = None,
) -> Tensor: ...


@overload
def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: str,
    scale_1h: Tensor | None = None,
    *,
    reader: PackedLinear | None,
) -> Inputs: ...


def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: str,
    scale_1h: Tensor | None = None,
    reader: PackedLinear | None = None,
) -> Inputs:
    """See `hasten.ops.gated_linear`."""
    if scale_1h is None and takes_pairs(x_th, weight):
        return gated_pairs(x_th, weight, bias_o, gate)
    both_to = linear(x_th, weight, bias_o, None)
    if scale_1h is None and reader is not None and rounds(reader, weight):
        return activated_rows(both_to, reader, gate, gated=True)
    (rows, hidden), inner = x_th.shape, weight.out_features // 2
    assert both_to.is_contiguous()
    hidden_th = both_to
    if scale_1h is not None:
        assert isinstance(x_th, Tensor)
        assert x_th.is_contiguous()
        hidden_th = x_th
    out = with_room(both_to, rows, inner)
    block = min(_BLOCK, triton.next_power_of_2(inner))
    _gate[(rows, triton.cdiv(inner, block))](
        both_to, hidden_th, both_to if scale_1h is None else scale_1h, out,
        H=hidden if scale_1h is not None else 1, INNER=inner, BLOCK_H=min(_BLOCK, triton.next_power_of_2(hidden)),
        BLOCK=block, GATE=gate, SCALED=scale_1h is not None, num_warps=4, **overlapped(both_to),
    )  # fmt: skip
    return out
